"""One thread at a time where torch works with state of the whole process.

torch.export and torch.onnx trace through global dispatch modes, and what they print is kept from the user by replacing
`sys.stdout` for a while: two threads inside would take each other's mode and put each other's stream back.
"""

from __future__ import annotations

import threading

TRACING = threading.RLock()
