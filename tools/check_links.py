"""Asks other hosts whether the links of the built site to them lead somewhere.

    python tools/check_links.py site

Each address is asked for once. An answer of 404 or 410, or no such host, is an error.
All else that goes wrong is reported as not checked, and is no error: many hosts refuse
programs, and a host may be down for an hour. It needs a network, and so it does not
belong to `make docs`.
"""

import http.client
import socket
import sys
import urllib.error
import urllib.request
from pathlib import Path

from check_site import Document, is_elsewhere

AGENT = {"User-Agent": "Mozilla/5.0 (a check of links)"}
GONE = 404, 410


def problem(address: str) -> tuple[bool, str] | None:
    """Asks for an address; returns whether it leads nowhere, and why, or None."""
    try:
        request = urllib.request.Request(address, headers=AGENT)
        with urllib.request.urlopen(request, timeout=30):
            return None
    except urllib.error.HTTPError as error:
        error.close()
        return error.code in GONE, f"status {error.code}"
    # A ValueError is an address that urllib cannot ask for.
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", error)
        unknown = isinstance(reason, socket.gaierror)
        # EAI_AGAIN is no answer: the name server could not be asked.
        return unknown and reason.errno != socket.EAI_AGAIN, repr(reason)


def main() -> None:
    """Prints the links that lead nowhere; the status is 1 if there is one."""
    addresses: dict[str, str] = {}
    for page in sorted(Path(sys.argv[1]).rglob("*.html")):
        for address in Document(page.read_text()).linked:
            if is_elsewhere(address):
                addresses.setdefault(address.split("#")[0], page.name)
    lost = unchecked = 0
    for address, page in addresses.items():
        if (found := problem(address)) is not None:
            nowhere, why = found
            lost, unchecked = lost + nowhere, unchecked + (not nowhere)
            verdict = "leads nowhere" if nowhere else "was not checked"
            print(f"{address} of {page} {verdict}: {why}")
    print(f"{len(addresses)} addresses of other hosts, {unchecked} not checked")
    if lost:
        sys.exit(f"{lost} of {len(addresses)} addresses lead nowhere")


if __name__ == "__main__":
    main()
