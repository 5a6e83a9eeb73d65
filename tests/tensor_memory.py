"""How much memory the tensors of a piece of work take, on any processor.

What a library allocates for itself inside an operation depends on the processor and is not counted.
"""

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class TensorMemory(TorchDispatchMode):
    """While it is entered, `most` is the largest number of bytes that tensors made under it have
    held at once."""

    def __init__(self):
        super().__init__()
        self.most = 0
        self._held = 0
        self._bytes: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for storage in _storages((args, kwargs)):
            self._bytes.setdefault(StorageWeakRef(storage), 0)  # made before, by somebody else
        result = function(*args, **(kwargs or {}))
        for storage in _storages(result):
            if (new := StorageWeakRef(storage)) not in self._bytes:
                self._bytes[new] = storage.nbytes()
                self._held += storage.nbytes()
        if self._held > self.most:  # where some of it may be dead by now
            for dead in [each for each in self._bytes if each.expired()]:
                self._held -= self._bytes.pop(dead)
            self.most = max(self.most, self._held)
        return result


def _storages(tree) -> list:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
