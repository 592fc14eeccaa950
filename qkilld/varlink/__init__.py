"""The service over Varlink, which needs no message bus. Entry point: `server.VarlinkServer`."""
