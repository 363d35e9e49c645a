"""The one way in which this project changes objects of other libraries: attributes that are put back afterwards."""

from contextlib import ExitStack
from typing import Any


class Patches(ExitStack):
    """Attributes of models and modules that are replaced until the block ends."""

    def replace(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute of one object, and put back what was there when the block ends."""
        own = vars(owner)
        if name in own:
            self.callback(setattr, owner, name, own[name])
        else:
            self.callback(delattr, owner, name)
        setattr(owner, name, value)
