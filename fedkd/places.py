"""Folders of results and caches where no setting names one: what the environment says, or the user's own."""

from __future__ import annotations

import os
from pathlib import Path

from fedkd.errors import UserError


def results_root() -> Path:
    """Return the folder of runs without a ``run.dir``: ``$FEDKD_RUNS``, or ``fedkd-runs`` in the home folder.

    Raises:
        UserError: as :func:`_told`; it cannot be a folder; or there is no home folder.
    """
    folder = _told("FEDKD_RUNS") or _home("FEDKD_RUNS") / "fedkd-runs"
    try:
        why = "it is a file" if folder.exists() and not folder.is_dir() else ""
    except OSError as error:
        why = str(error.strerror)
    if why:
        raise UserError(f"the results cannot be written to {folder}: {why}; set FEDKD_RUNS to another folder")
    return folder


def cache_root() -> Path:
    """Return the folder of decoded data: ``$FEDKD_CACHE``, or ``fedkd`` in the user's cache folder.

    Raises:
        UserError: as :func:`_told`, or there is no home folder.
    """
    if told := _told("FEDKD_CACHE"):
        return told
    caches = Path(os.environ.get("XDG_CACHE_HOME", ""))  # its specification: one that is not absolute is none
    return (caches if caches.is_absolute() else _home("FEDKD_CACHE") / ".cache") / "fedkd"


def _told(variable: str) -> Path | None:
    """Return the folder that a variable of the environment names; None where it is not set, or empty.

    Raises:
        UserError: it starts with a user who is not there, or is not absolute: it would be another folder in every
            process that works elsewhere, as Flower's and Ray's do.
    """
    text = os.environ.get(variable, "").strip()
    if not text:
        return None
    try:
        folder = Path(text).expanduser()
    except RuntimeError as error:
        raise UserError(f"{variable} = '{text}': {error}") from error
    if not folder.is_absolute():
        raise UserError(f"{variable} = '{text}' has to be absolute, since nodes work elsewhere: {folder.absolute()}")
    return folder


def _home(variable: str) -> Path:
    try:
        return Path.home()
    except RuntimeError as error:
        raise UserError(f"there is no home folder; set {variable}") from error
