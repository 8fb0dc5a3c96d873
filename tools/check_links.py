"""Asks other hosts whether the links of the built site to them lead somewhere.

    python tools/check_links.py site

Each address is asked for once. An answer of 404 or 410, or no such host, is an error.
Other refusals are not: many hosts refuse programs. It needs a network, and so it does
not belong to `make docs`.
"""

import sys
import urllib.error
import urllib.request
from pathlib import Path

from check_site import Document, is_elsewhere

AGENT = {"User-Agent": "Mozilla/5.0 (a check of links)"}
GONE = 404, 410


def problem(address: str) -> str | None:
    """Returns what is wrong with an address, or None."""
    request = urllib.request.Request(address, headers=AGENT)
    for last in (False, True):
        try:
            with urllib.request.urlopen(request, timeout=30):
                return None
        except urllib.error.HTTPError as error:
            return f"{address}: {error.code}" if error.code in GONE else None
        except OSError as error:
            if last:
                return f"{address}: {error}"
    return None


def main() -> None:
    """Prints the links that lead nowhere; the status is 1 if there is one."""
    addresses: dict[str, str] = {}
    for page in sorted(Path(sys.argv[1]).rglob("*.html")):
        for address in Document(page.read_text()).linked:
            if is_elsewhere(address):
                addresses.setdefault(address.split("#")[0], page.name)
    found = [
        f"{page} links to {p}" for a, page in addresses.items() if (p := problem(a))
    ]
    print(*found, sep="\n", end="\n" if found else "")
    if found:
        sys.exit(f"{len(found)} of {len(addresses)} addresses lead nowhere")
    print(f"{len(addresses)} addresses of other hosts")


if __name__ == "__main__":
    main()
