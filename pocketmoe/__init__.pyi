from pocketmoe.api import Chat as Chat
from pocketmoe.api import Generation as Generation
from pocketmoe.api import Model as Model
from pocketmoe.api import Stream as Stream
from pocketmoe.api import evaluate as evaluate
from pocketmoe.api import export as export
from pocketmoe.api import load as load
from pocketmoe.api import plan as plan
from pocketmoe.api import quantize as quantize

__version__: str
TELEMETRY_OFF: dict[str, str]
