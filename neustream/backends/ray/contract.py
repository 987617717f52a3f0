"""The names of Ray's that are used, and the versions that have been tried. Checked at start."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Sequence
from typing import Any

from neustream.errors import BackendError

FIRST, BEYOND = (2, 50), (3, 0)
"""Versions from the first on, below the second."""

NAMES: Sequence[tuple[str, str, Sequence[str]]] = (
    ("ray", "init", ("address", "namespace", "log_to_driver", "configure_logging", "num_cpus")),
    ("ray", "is_initialized", ()),
    ("ray", "shutdown", ()),
    ("ray", "kill", ("actor", "no_restart")),
    ("ray", "get_actor", ("name", "namespace")),
    ("ray", "get", ()),
    ("ray", "wait", ("num_returns", "timeout")),
    ("ray.util", "list_named_actors", ("all_namespaces",)),
    ("ray", "cluster_resources", ()),
    ("ray", "nodes", ()),
    ("ray", "remote", ()),
    ("ray", "ObjectRef.future", ()),
    ("ray", "get_runtime_context", ()),
    ("ray.runtime_context", "RuntimeContext.get_node_id", ()),
    ("ray.runtime_context", "RuntimeContext.get_accelerator_ids", ()),
    ("ray.exceptions", "RayActorError", ()),
    ("ray.exceptions", "RayTaskError", ()),
    ("ray.exceptions", "RayError", ()),
    ("ray.util", "get_node_ip_address", ()),
)
"""Module, name, and the arguments that we give by name."""


def check(ray: Any) -> None:
    """BackendError if this Ray is not one that has been tried, or lacks something; all of it named."""
    version = str(ray.__version__)
    known = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if not FIRST <= known < BEYOND:
        raise BackendError(
            f"Ray {version} is installed; neustream[ray] works with versions from "
            f"{_text(FIRST)} on, below {_text(BEYOND)}"
        )
    lacking = [f"{module}.{name}{what}" for module, name, args in NAMES if (what := _lacks(module, name, args))]
    if lacking:
        raise BackendError(f"Ray {version} lacks what neustream uses: {'; '.join(lacking)}")


def _lacks(module: str, name: str, arguments: Sequence[str]) -> str:
    """What is not there of a name; empty: it is as it is used."""
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError):
        return " (is not there)"
    if not arguments:
        return ""
    taken = inspect.signature(found).parameters
    if any(one.kind is one.VAR_KEYWORD for one in taken.values()):
        arguments = [one for one in arguments if one in taken or one in ("configure_logging",)]
    missing = [one for one in arguments if one not in taken]
    return f" (takes no {', '.join(missing)})" if missing else ""


def _text(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
