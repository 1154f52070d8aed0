"""The keys that sign datagrams."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

TAG_BYTES = 16
KEY_BYTES = 32


class Keyring:
    """Keys by id, 1 to 255: the key `signer` signs, and every key is accepted. `repr` shows no key."""

    __slots__ = ("_bases", "signer")

    def __init__(self, signer: int, keys: Mapping[int, bytes]) -> None:
        if signer not in keys:
            raise ValueError(f"key {signer} is to sign but is not in the ring")
        for key_id, key in keys.items():
            if not 0 < key_id < 256 or len(key) != KEY_BYTES:
                raise ValueError(f"key {key_id}: ids are 1 to 255, keys {KEY_BYTES} bytes")
        self.signer = signer
        self._bases = {key_id: hashlib.blake2b(digest_size=TAG_BYTES, key=key) for key_id, key in keys.items()}

    @property
    def ids(self) -> tuple[int, ...]:
        """The ids of the keys that are accepted."""
        return tuple(self._bases)

    def base(self, key_id: int) -> hashlib.blake2b:
        """A hash object keyed with the key: copy the object, never update it. Keying a new object costs twice as much as a copy."""
        return self._bases[key_id]

    def tag(self, key_id: int, data: bytes | memoryview) -> bytes:
        """The tag of `data` under a key of the ring."""
        state = self._bases[key_id].copy()
        state.update(data)
        return state.digest()

    def __repr__(self) -> str:
        return f"Keyring(ids {sorted(self._bases)}, {self.signer} signs)"
