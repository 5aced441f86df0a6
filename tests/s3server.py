"""A small S3 on loopback, in a process of its own: prints its port, then serves until it is ended."""

from __future__ import annotations

import logging
import time

from moto.server import ThreadedMotoServer

if __name__ == "__main__":
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    print(server.get_host_and_port()[1], flush=True)
    time.sleep(3600)
