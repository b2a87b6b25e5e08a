"""Exit 0 while the service in this container answers /health, else 1. Nothing but the standard library."""

import http.client
import os
import sys

try:
    connection = http.client.HTTPConnection("127.0.0.1", int(os.environ.get("PORT", "8000")), timeout=2)
    connection.request("GET", "/health")
    sys.exit(connection.getresponse().status != 200)
except (OSError, http.client.HTTPException) as error:
    sys.exit(f"/health: {error}")
