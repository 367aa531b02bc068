"""A local web page to play adapters, watch training runs, and prepare data; `sa3-studio` starts it.

`server/` holds what all pages share; `play/`, `runs/`, `data/` and `adapters/` are one page each.
"""

from typing import TYPE_CHECKING

from sa3train.core.lazy import make_getattr

if TYPE_CHECKING:
    from sa3train.studio.app import run_studio
    from sa3train.studio.server.access import AccessSettings
    from sa3train.studio.server.workspace import StudioError, Workspace

__all__ = ["AccessSettings", "StudioError", "Workspace", "run_studio"]
__getattr__ = make_getattr(
    __name__,
    {
        "AccessSettings": "server.access",
        "StudioError": "server.workspace",
        "Workspace": "server.workspace",
        "run_studio": "app",
    },
)
