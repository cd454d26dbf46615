"""The key that clients must send, where one is asked for."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from pathlib import Path

from nps_compress.errors import InvalidArgumentError

API_KEY_VARIABLE = "NPS_COMPRESS_API_KEY"
OPEN = "whoever reaches this address can use it: there is no API key"
_LONGEST = 4096


def read_api_key(path: Path | None, environment: Mapping[str, str]) -> str | None:
    """The key from a file or, without one, from the environment; None: none is asked for.

    Raises:
        InvalidArgumentError: there is no such file, or what it holds is no key.
    """
    if path is not None:
        where = str(path)
        try:
            with path.open("rb") as stream:
                found = stream.read(_LONGEST + 1).decode("utf-8", "replace").strip()
        except OSError as error:
            raise InvalidArgumentError(
                "--api-key-file", where, f"a readable file ({error.strerror})"
            ) from None
    elif API_KEY_VARIABLE in environment:
        where, found = API_KEY_VARIABLE, environment[API_KEY_VARIABLE].strip()
    else:
        return None
    if not found or len(found) > _LONGEST or not found.isascii() or not found.isprintable():
        raise InvalidArgumentError(
            "the API key", where, "a line of printable ASCII characters, not empty"
        )
    return found


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a host, a name or an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
