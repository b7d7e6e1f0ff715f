"""Opens the site in headless Chromium: titles, the search box, and no message in the console.

`python scripts/browse.py [--screenshots DIRECTORY]`, after scripts/docs. The status is 1 if something is wrong, and 2
without Chromium.
"""

import argparse
import functools
import html.parser
import http.server
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

SITE = Path(__file__).parent.parent / "build" / "docs"
PAGES = {
    "index.html": "lora_jax",
    "how_it_works.html": "How it works",
    "guides/training.html": "Training",
    "methods/dora.html": "DoRA",
    "notebooks/lora_from_scratch.html": "LoRA and DoRA from scratch",
    "reference/core.html": "Core",
    "troubleshooting.html": "Troubleshooting",
}
SIZES = {"desktop": (1280, 900), "phone": (500, 900)}  # Chromium's windows have at least 500 pixels
PHRASE = "DoRA"


class Form(html.parser.HTMLParser):
    """The action and the field of the page's search form."""

    action, field = "", ""

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        if tag == "form" and "search" in (attributes.get("class") or ""):
            self.action = attributes.get("action") or ""
        if tag == "input" and attributes.get("type") == "search" and self.action:
            self.field = attributes.get("name") or ""


class Server(http.server.SimpleHTTPRequestHandler):
    """Serves the site and records what it does not have."""

    missing: list[str] = []  # noqa: RUF012 (one for all requests)

    def log_message(self, format, *args):
        del format, args

    def send_error(self, code, *args, **kwargs):
        self.missing.append(f"{code} {self.path}")
        super().send_error(code, *args, **kwargs)


def browse(chromium: str, url: str, *options: str) -> tuple[str, list[str]]:
    """Returns the document after its scripts ran, and the messages of its console. No other host exists."""
    with tempfile.TemporaryDirectory() as profile:
        command = [
            chromium,
            *("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={profile}"),
            *("--enable-logging=stderr", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"),
            *("--virtual-time-budget=20000", *options, url),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    lines = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return done.stdout, [line for line in lines if '"[PST]: ' not in line]  # the theme's log of what it does


def find_problems(chromium: str, address: str) -> list[str]:
    """Opens pages and returns what is wrong with them."""
    problems = []
    for page, title in PAGES.items():
        document, console = browse(chromium, f"{address}/{page}", "--dump-dom")
        shown = re.search(r"<title>(.*?)</title>", document, re.DOTALL)
        if shown is None or title not in shown[1]:
            problems.append(f"{page}: the title is {shown and shown[1].strip()!r}, expected {title!r}")
        problems += [f"{page}: {line}" for line in console]
    form = Form()
    form.feed((SITE / "index.html").read_text(encoding="utf-8"))
    document, console = browse(chromium, f"{address}/{form.action}?{form.field}={PHRASE}", "--dump-dom")
    results = re.findall(r'<li[^>]*>\s*<a href="([^"]+)"', document.partition('id="search-results"')[2])
    if not any("dora" in result for result in results):
        problems.append(f"the search box ({form.action}?{form.field}=) finds no page on {PHRASE}, but {results[:5]}")
    problems += [f"search: {line}" for line in console]
    return problems + [f"not in the site: {line}" for line in Server.missing]


def take_screenshots(chromium: str, address: str, folder: Path) -> None:
    """Writes images of pages at two widths, light and dark."""
    folder.mkdir(parents=True, exist_ok=True)
    for page in ("index.html", "guides/training.html", "notebooks/lora_from_scratch.html", "reference/core.html"):
        for size, (width, height) in SIZES.items():
            for theme, options in {"light": (), "dark": ("--blink-settings=preferredColorScheme=0",)}.items():
                name = f"{Path(page).parent.name or 'start'}-{size}-{theme}.png"
                window = f"--window-size={width},{height}"
                browse(chromium, f"{address}/{page}", f"--screenshot={folder / name}", window, *options)


def main() -> int:
    """Runs the checks."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--screenshots", type=Path, metavar="DIRECTORY", help="write images of pages there instead")
    arguments = parser.parse_args()
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        print("error: the pages were not opened, since there is no Chromium: apt install chromium", file=sys.stderr)
        return 2
    handler = functools.partial(Server, directory=str(SITE))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        if arguments.screenshots:
            take_screenshots(chromium, address, arguments.screenshots)
            return 0
        problems = find_problems(chromium, address)
        server.shutdown()
    print("\n".join(problems) or f"{len(PAGES)} pages and the search are fine")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
