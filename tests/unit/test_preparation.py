"""What is known of an image's way to the model without the model."""

from __future__ import annotations

import subprocess
import sys

import pytest
from detectron2.data.transforms import ResizeShortestEdge
from hypothesis import given, settings
from hypothesis import strategies as st

from bentoml_detectron.preparation import scaled

lengths = st.integers(1, 30_000)


@pytest.mark.slow
@settings(max_examples=2000, deadline=None)
@given(lengths, lengths, st.integers(1, 2000), st.integers(1, 3000))
def test_images_are_scaled_to_detectron2s_sizes(height, width, shortest, longest):
    assert scaled(height, width, shortest, longest) == ResizeShortestEdge.get_output_shape(height, width, shortest, longest)


@pytest.mark.slow
def test_worker_needs_no_pytorch():
    """A worker of a service prepares images and spells results, and has its model in another process."""
    modules = "bentoml_detectron.service.front, bentoml_detectron.memory, bentoml_detectron.drawing"
    code = f"import sys, {modules}; print({{'torch', 'detectron2'}} & {{*sys.modules}})"
    ran = subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, capture_output=True, text=True)
    assert ran.stdout.strip() == "set()"
