"""Watches the key file while the process runs: keys rotate without a restart."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from config import Config
from sllm.deploy.keys import key_path, key_stamp, load_keyring
from sllm.protocol.errors import UsageError
from sllm.wire.keys import Keyring


class KeyWatch:
    """The process's keys, read at the start and again when the file has changed. The constructor raises UsageError if there are no keys."""

    def __init__(self, config: Config, environ: Mapping[str, str]) -> None:
        self._config = config
        self._environ = environ
        self._path = key_path(config)
        stamp = key_stamp(self._path)  # taken before reading, so that a file that changes in between is read again
        self.keyring: Keyring = load_keyring(config, environ)
        self._as_of = stamp or key_stamp(self._path)  # no stamp before reading: reading has just made the file
        self._trouble = ""  # why the present file cannot be used

    def look(self, log: logging.Logger) -> bool:
        """Read the file if it has changed or could not be used at the last call; returns whether the keys have changed. A file that cannot be used changes
        nothing and is logged once."""
        stamp = key_stamp(self._path)
        if stamp == self._as_of and not self._trouble:
            return False
        try:
            if stamp is None:
                raise UsageError(f"cluster key {self._path}: is gone")
            ring = load_keyring(self._config, self._environ)
        except UsageError as error:
            if str(error) != self._trouble:
                log.error("%s; the keys in use stay", error)
            self._trouble = str(error)
            return False
        back, self._trouble, self._as_of = bool(self._trouble), "", stamp
        if _fingerprint(ring) == _fingerprint(self.keyring):
            if back:
                log.info("the key file %s can be read again, and has the same keys", self._path)
            return False
        self.keyring = ring
        return True


def _fingerprint(ring: Keyring) -> tuple[int, dict[int, bytes]]:
    """A value that is equal for keyrings with the same keys and reveals no key."""
    return ring.signer, {key_id: ring.tag(key_id, b"") for key_id in ring.ids}
