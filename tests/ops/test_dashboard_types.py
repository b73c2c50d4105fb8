"""The committed JSON type-checks against Grafana's own types, npm's ``@grafana/schema``.

Each panel's options and field configuration are checked against the types of
its kind, so that a misspelt option, which Grafana would ignore in silence, is
an error here.
"""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, NoReturn

import pytest

from tests.ops.dashboard_support.panels import load, panels

pytestmark = [pytest.mark.services, pytest.mark.xdist_group("types")]

SCHEMA, TYPESCRIPT = "@grafana/schema@12.4.2", "typescript@5.9.3"
KINDS = {
    "timeseries": "TimeSeries", "table": "Table", "stat": "Stat", "heatmap": "Heatmap",
    "bargauge": "BarGauge", "state-timeline": "StateTimeline",
}  # fmt: skip
#: Kinds whose types name no field configuration of their own.
PLAIN = ("table", "stat", "bargauge")

PRELUDE = """\
import type * as schema from '@grafana/schema';
%(imports)s
// Enums as the strings and numbers that they are in JSON.
type Json<T> = unknown extends T ? T
  : T extends string ? `${T}`
  : T extends number ? (`${T}` extends `${infer N extends number}` ? N : T)
  : T extends (infer U)[] ? Json<U>[]
  : T extends object ? { [K in keyof T]: Json<T[K]> }
  : T;
// Fields of Grafana's own models that the schema leaves open.
type Variable = schema.VariableModel & { definition?: string };
type Annotation = Omit<schema.AnnotationQuery, 'target'> & {
  titleFormat?: string; textFormat?: string;
  target: (schema.DataQuery & { expr: string; interval: string; instant: boolean; range: boolean })
    | { tags: string[]; limit: number; matchAny: boolean; type: 'tags' };
};
type Query = schema.DataQuery & {
  expr: string; format?: 'time_series' | 'table' | 'heatmap'; instant?: boolean; range?: boolean; legendFormat?: string;
};
type Of<Options, Field> = Omit<schema.Panel<Options, Field>, 'targets' | 'options' | 'fieldConfig' | 'type'> & {
  type: string; options?: Partial<Options>; targets: Query[];
  fieldConfig?: Omit<schema.FieldConfigSource, 'defaults'> & {
    defaults: Omit<schema.FieldConfig, 'custom'> & { custom?: Partial<Field> };
  };
};
type Whole = Omit<schema.Dashboard, 'panels' | 'templating' | 'annotations'>
  & { templating: { list: Variable[] }; annotations: { list: Annotation[] } };
"""


@pytest.fixture(scope="module")
def project() -> Path:
    """A folder with the pinned packages, kept between runs in the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "gradwatch-tests" / "grafana-schema"
    stamp = cache / "installed"
    if stamp.exists() and stamp.read_text() == SCHEMA + TYPESCRIPT:
        return cache
    npm = shutil.which("npm")
    if npm is None:
        _missing("npm is not here")
    cache.mkdir(parents=True, exist_ok=True)
    (cache / "package.json").write_text('{"private": true}')
    install = [str(npm), "install", "--no-audit", "--no-fund", "--ignore-scripts", "--no-save", SCHEMA, TYPESCRIPT]
    try:
        made = subprocess.run(install, cwd=cache, capture_output=True, text=True, timeout=150, check=False)
    except subprocess.TimeoutExpired:
        _missing("npm did not answer in time")
    if made.returncode != 0:
        _missing(f"npm could not install: {made.stderr[-300:]}")
    stamp.write_text(SCHEMA + TYPESCRIPT)
    return cache


def _missing(why: str) -> NoReturn:
    if os.environ.get("GRADWATCH_REQUIRE_SERVICES") == "1":
        pytest.fail(why)
    pytest.skip(f"{why}; {SCHEMA} is needed to type-check the dashboards")


def source(dashboards: dict[str, dict[str, Any]]) -> str:
    """TypeScript that assigns every part of the dashboards to its type."""
    imports = "\n".join(
        f"import type * as {name} from '@grafana/schema/dist/esm/raw/composable/"
        f"{name.lower()}/panelcfg/x/{name}PanelCfg_types.gen';"
        for name in KINDS.values()
    )
    lines = [PRELUDE % {"imports": imports}]
    for number, dashboard in enumerate(dashboards.values()):
        whole = {key: value for key, value in dashboard.items() if key != "panels"}
        lines.append(f"const dashboard{number}: Json<Whole> = {json.dumps(whole, indent=1)};")
        for panel in dashboard["panels"]:
            name = f"panel{number}_{panel['id']}"
            if panel["type"] == "row":
                lines.append(f"const {name}: Json<schema.RowPanel> = {json.dumps(panel, indent=1)};")
                continue
            kind = KINDS[panel["type"]]
            field = "schema.TableFieldOptions" if panel["type"] == "table" else f"{kind}.FieldConfig"
            field = "object" if panel["type"] in PLAIN[1:] else field
            lines.append(f"const {name}: Json<Of<{kind}.Options, {field}>> = {json.dumps(panel, indent=1)};")
    return "\n".join(lines) + "\nexport {};\n"


def check(project: Path, text: str, name: str) -> str:
    """What the compiler says; empty where all fits."""
    file = project / f"{name}.ts"
    file.write_text(text)
    compiler = project / "node_modules" / "typescript" / "bin" / "tsc"
    options = ["--noEmit", "--strict", "--skipLibCheck", "--module", "esnext", "--moduleResolution", "bundler"]
    node = shutil.which("node")
    if node is None:
        _missing("node is not here")
    told = subprocess.run(
        [str(node), str(compiler), *options, str(file)],
        cwd=project,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    file.unlink()
    return told.stdout + told.stderr


def test_all_dashboards_fit_grafanas_types(project: Path) -> None:
    assert check(project, source(load()), f"all-{os.getpid()}") == ""


def test_what_grafana_would_ignore_in_silence_is_an_error(project: Path) -> None:
    """A misspelt option, an unknown mode and a string for a number: a panel each, as one error hides another."""
    broken = copy.deepcopy(load()["gradwatch-oncall"])
    first, second, third = [panel for panel in panels(broken) if panel["type"] == "timeseries"][:3]
    first["options"]["legend"]["calculations"] = first["options"]["legend"].pop("calcs")
    second["fieldConfig"]["defaults"]["custom"]["drawStyle"] = "lines"
    third["gridPos"]["w"] = "12"
    broken["templating"]["list"][1]["refresh"] = 7
    told = check(project, source({"broken": broken}), f"broken-{os.getpid()}")
    assert len(re.findall(r"error TS", told)) == 4, told
    for part in ("calculations", '"lines"', "'string' is not assignable to type 'number'", "'7' is not assignable"):
        assert part in told
