from .app import run_studio as run_studio
from .server.access import AccessSettings as AccessSettings
from .server.workspace import StudioError as StudioError
from .server.workspace import Workspace as Workspace
