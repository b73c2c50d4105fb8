"""A headless Chromium that opens files of this machine and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from selenium import webdriver

from tests.services import program


@contextmanager
def browser(profile: Path, *, width: int = 1200, height: int = 900) -> Iterator[webdriver.Chrome]:
    """Debian's Chromium, driven by its ChromeDriver; ended with the block."""
    options = webdriver.ChromeOptions()
    options.binary_location = program("chromium")
    for argument in (
        "headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
        "disable-component-update", "disable-sync", "disable-dev-shm-usage", f"user-data-dir={profile}",
        f"window-size={width},{height}", "host-resolver-rules=MAP * ~NOTFOUND",
    ):  # fmt: skip
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(program("chromedriver")))
    try:
        driver.set_page_load_timeout(60)
        driver.set_script_timeout(60)
        yield driver
    finally:
        driver.quit()
