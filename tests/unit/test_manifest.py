"""A manifest has one spelling, and says so itself when it is damaged."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bentoml_detectron import errors
from bentoml_detectron.artifact import manifest

NAMES = st.text(max_size=20)
MANIFESTS = st.builds(
    manifest.Manifest,
    format=st.just(1),
    kind=st.sampled_from(["predictor", "module"]),
    config=st.just("yacs"),
    config_tuples=st.lists(st.lists(st.one_of(NAMES, st.integers(0, 9)), max_size=3), max_size=3),
    input=st.builds(manifest.Input, format=NAMES, min_size_test=st.integers(0), max_size_test=st.integers(0)),
    dataset=st.one_of(
        st.none(),
        st.builds(
            manifest.Dataset,
            name=NAMES,
            thing_classes=st.one_of(st.none(), st.lists(NAMES, max_size=3)),
            thing_colors=st.lists(st.tuples(*[st.integers(0, 255)] * 3), max_size=3),
            thing_dataset_id_to_contiguous_id=st.dictionaries(st.integers(0, 99), st.integers(0, 99), max_size=3),
            keypoint_connection_rules=st.lists(st.tuples(NAMES, NAMES, st.just((1, 2, 3))), max_size=2),
        ),
    ),
    registry_entries=st.lists(st.builds(manifest.Entry, registry=NAMES, name=NAMES, module=NAMES), max_size=3),
    versions=st.dictionaries(NAMES, NAMES, max_size=3),
    files=st.dictionaries(
        NAMES,
        st.builds(manifest.FileRecord, size=st.integers(0, 2**40), sha256=st.just("0" * 64), xxh3_128=st.just("f" * 32)),
        max_size=3,
    ),
)  # fmt: skip


@given(original=MANIFESTS)
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_comes_back_as_it_was(original, tmp_path):
    (tmp_path / manifest.MANIFEST).write_bytes(manifest.dump(original))
    assert manifest.read(tmp_path) == original


@given(original=MANIFESTS, data=st.data())
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_flipped_bit_is_found(original, data, tmp_path):
    text = bytearray(manifest.dump(original))
    position = data.draw(st.integers(0, len(text) * 8 - 1))
    text[position // 8] ^= 1 << position % 8
    (tmp_path / manifest.MANIFEST).write_bytes(text)
    with pytest.raises(errors.CorruptFileError):
        manifest.read(tmp_path)


def test_another_spelling_of_the_same_is_refused(tmp_path):
    import json

    original = manifest.Manifest(
        format=1, kind="module", config="yacs", config_tuples=[], dataset=None, registry_entries=[], versions={}, files={},
        input=manifest.Input(format="BGR", min_size_test=1, max_size_test=2),
    )  # fmt: skip
    (tmp_path / manifest.MANIFEST).write_text(json.dumps(json.loads(manifest.dump(original)), sort_keys=True))
    with pytest.raises(errors.CorruptFileError):
        manifest.read(tmp_path)


@pytest.mark.parametrize(("number", "is_id"), [(2**63 - 1, True), (-(2**63), True), (2**63, False), (-(2**63) - 1, False)])
def test_ids_have_64_bits(tmp_path, number, is_id):
    """Of larger ones, as many as fit into a manifest can have the same hash."""
    original = manifest.Manifest(
        format=1, kind="module", config="yacs", config_tuples=[], registry_entries=[], versions={}, files={},
        dataset=manifest.Dataset(name="x", thing_dataset_id_to_contiguous_id={7: 0}),
        input=manifest.Input(format="BGR", min_size_test=1, max_size_test=2),
    )  # fmt: skip
    forged = original.model_dump(mode="json")
    forged["dataset"]["thing_dataset_id_to_contiguous_id"] = {str(number): 0}
    (tmp_path / manifest.MANIFEST).write_bytes(manifest.spell(forged))
    if is_id:
        assert manifest.read(tmp_path).dataset.thing_dataset_id_to_contiguous_id == {number: 0}
    else:
        with pytest.raises(errors.CorruptFileError, match="is not a valid manifest"):
            manifest.read(tmp_path)


def test_records_what_is_in_a_file(tmp_path):
    import hashlib

    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "some").write_bytes(b"some bytes")
    for name, content in (("empty", b""), ("some", b"some bytes")):
        record = manifest.record(tmp_path, name)
        assert (record.size, record.sha256) == (len(content), hashlib.sha256(content).hexdigest())


def test_damaged_byte_does_not_put_the_file_into_the_message(tmp_path):
    (tmp_path / "manifest.json").write_bytes(b'{"a": "' + b"x" * 20_000 + b"\xff")
    with pytest.raises(errors.CorruptFileError, match="save the model again") as caught:
        manifest.read(tmp_path)
    assert len(str(caught.value)) < 500
