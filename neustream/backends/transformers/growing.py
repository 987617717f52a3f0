"""Storage of slots whose memory is taken as they fill, page by page, and given back when they are left.

Addresses are had at once, for slots of full length, so that kernels read and write a slot as they
would a tensor that was made whole, and round alike. It is what vAttention does (arXiv 2405.04437).
"""

from __future__ import annotations

import math
import mmap
import sys

import torch

NO_RESERVE = 0x4000
"""Linux's MAP_NORESERVE: addresses beyond the machine's memory may be had."""


def grows(device: torch.device) -> bool:
    """Whether memory of storage on a device can be taken and given back in pages: on CPUs under Linux."""
    return device.type == "cpu" and sys.platform == "linux"


class Growing:
    """A tensor [slots, heads, length, width] of zeros, which takes no memory where nothing was written.

    Raises:
        MemoryError: there are not so many addresses.
    """

    def __init__(self, slots: int, heads: int, length: int, width: int, dtype: torch.dtype) -> None:
        page = mmap.PAGESIZE
        self._row = length * width * dtype.itemsize
        self._token = width * dtype.itemsize
        self._slot = -(-heads * self._row // page) * page
        try:
            how = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE
            self._memory = mmap.mmap(-1, max(slots * self._slot, page), flags=how)
        except (OSError, OverflowError) as error:
            raise MemoryError(f"no addresses for {slots} slots of {self._slot:,} bytes: {error}") from error
        self._memory.madvise(mmap.MADV_NOHUGEPAGE)
        strides = (self._slot // dtype.itemsize, length * width, width, 1)
        flat = torch.frombuffer(self._memory, dtype=dtype)
        self._heads = heads
        self.tensor = flat.as_strided((slots, heads, length, width), strides)

    def give_back(self, slot: int, first: int = 0) -> None:
        """Give back the memory of a slot from token `first` on, in whole pages: zeros are read there then.

        With `first`, pages that hold tokens before it too stay as they are.
        """
        if not first:
            self._memory.madvise(mmap.MADV_DONTNEED, slot * self._slot, self._slot)
            return
        page = mmap.PAGESIZE
        for head in range(self._heads):
            row = slot * self._slot + head * self._row
            begin = math.ceil((row + first * self._token) / page) * page
            end = (row + self._row) // page * page
            if end > begin:
                self._memory.madvise(mmap.MADV_DONTNEED, begin, end - begin)
