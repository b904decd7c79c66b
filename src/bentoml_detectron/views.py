"""Views of modules: copies that share the parameters, to change or write to while others use the original."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


def view(module: nn.Module, change: Callable[[nn.Module], dict[str, Any]]) -> nn.Module:
    """A view of a module, with other attributes than it has; the module itself where none are.

    Args:
        module: Left as it is.
        change: The attributes that each of its modules shall have in the view; none for most.
    """
    children = {name: child and view(child, change) for name, child in module._modules.items()}
    attributes = change(module)
    if not attributes and all(child is module._modules[name] for name, child in children.items()):
        return module
    copied = module.__class__.__new__(module.__class__)
    copied.__dict__ = {**module.__dict__, "_modules": children, **attributes}
    return copied


def own_modules(module: nn.Module) -> nn.Module:
    """A view of a module in which every module is another, to write to."""
    return view(module, lambda each: {"training": False})
