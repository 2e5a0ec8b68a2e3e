"""Values that belong to a model object, for things that outlive it."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from torch import nn

T = TypeVar("T")


class PerModel(Generic[T]):
    """A value for each model, of which one is in use. It keeps no model alive, and forgets those that are gone.

    A value that is in use without a model (a new one, one that was restored, or one that came out of a pickle) goes to
    the first model that comes.

    Args:
        new: makes the value of a model that is not known.

    Example:
        >>> counts, first, second = PerModel(int), nn.Linear(1, 1), nn.Linear(1, 1)
        >>> counts.switch(first, 3), counts.switch(second, 3), counts.switch(first, 5)
        (3, 0, 3)
    """

    def __init__(self, new: Callable[[], T]) -> None:
        self._new = new
        self._model: weakref.ref[nn.Module] | None = None
        self._others: weakref.WeakKeyDictionary[nn.Module, T] = weakref.WeakKeyDictionary()

    @property
    def model(self) -> nn.Module | None:
        """The model whose value is in use, while it exists."""
        return None if self._model is None else self._model()

    @property
    def is_new(self) -> bool:
        """Tell if no model has come yet."""
        return self._model is None and not self._others

    def take_over(self, other: PerModel[T]) -> None:
        """Take the values that another object has put away, of models that have none here."""
        for model, value in other._others.items():
            if model is not self.model:
                self._others.setdefault(model, value)

    def switch(self, model: nn.Module | None, value: T, is_of: Callable[[T], bool] = lambda value: False) -> T:
        """Put away the value in use, and return that of another model.

        Args:
            model: the model; ``None`` for a new value that goes to the model that comes next.
            value: the value in use.
            is_of: asked about known values if the model has none: ``True`` gives the model a copy of it.
        """
        own, has_owner = self.model, self._model is not None
        if model is not None and (model is own or not has_owner):
            self._model = weakref.ref(model)
            self._others.pop(model, None)
            return value
        self._model = None if model is None else weakref.ref(model)
        if own is not None:
            self._others[own] = value
        if model is None:
            return self._new()
        if model in self._others:
            return self._others.pop(model)
        for known in (value, *self._others.values()):
            if is_of(known):
                return copy.deepcopy(known)
        return self._new()

    def __getstate__(self) -> dict[str, Any]:
        # weak references cannot be pickled, and a copy of the owner is about no model yet
        return {"_new": self._new}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["_new"])  # type: ignore[misc]
