"""The files of deploy/ fit the server: its flags, its port, its metrics. Nothing is started."""

import configparser
import json
import re
import shlex
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml

from budgetvlm.cli import command_parser
from budgetvlm.engines.dialects import TRUST_FLAG
from budgetvlm.engines.fleet_file import read_fleet
from budgetvlm.serving.app import make_app
from budgetvlm.serving.dispatcher import Dispatcher
from budgetvlm.serving.gate import Gate
from budgetvlm.serving.serve_options import ServeOptions
from budgetvlm.serving.server_metrics import ServerMetrics

DEPLOY = Path(__file__).resolve().parents[1] / "deploy"
ROOT = DEPLOY.parent
GRACE_S = ServeOptions.grace_s + 6  # and what replicas have to end


def flags_of(words):
    return command_parser("serve").parse_args(words)


def instructions():
    """The Dockerfile's instructions, each with what follows it."""
    text = re.sub(r"\\\n", " ", (DEPLOY / "Dockerfile").read_text())
    return [line.split(maxsplit=1) for line in text.splitlines() if line and not line.startswith("#")]


def entry_point():
    (entry,) = [json.loads(rest) for name, rest in instructions() if name == "ENTRYPOINT"]
    assert entry[:2] == ["budgetvlm", "serve"]
    return entry[2:]


def test_the_dockerfile_copies_what_exists_and_serves_as_somebody_without_rights():
    ignored = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    copies = [rest for name, rest in instructions() if name == "COPY" and "--from" not in rest]
    for source in [source for copy in copies for source in copy.split()[:-1]]:
        assert (ROOT / source).exists() and f"!{source}" in ignored
    users = [rest for name, rest in instructions() if name == "USER"]
    assert users and users[-1] != "root"
    assert flags_of(entry_point()).host == "0.0.0.0"
    ports = [rest for name, rest in instructions() if name == "EXPOSE"]
    assert ports == [str(ServeOptions.port)]


def test_the_compose_file_gives_flags_that_exist_and_time_to_finish():
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    server = services["server"]
    assert flags_of([*entry_point(), *server["command"]]).budget_ms == 1000
    assert (DEPLOY / server["build"]["context"] / server["build"]["dockerfile"]).is_file()
    assert int(server["stop_grace_period"].removesuffix("s")) > GRACE_S
    for service in services.values():
        assert all(port.startswith("127.0.0.1:") for port in service["ports"]), "reachable from elsewhere"
        mounted = [volume.split(":")[0] for volume in service["volumes"] if volume.startswith(".")]
        assert all((DEPLOY / path).exists() for path in mounted)
    targets = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())["scrape_configs"][0]["static_configs"]
    assert targets == [{"targets": [f"server:{ServeOptions.port}"]}]


def test_the_compose_file_in_front_of_an_engine_fits_its_fleet():
    services = yaml.safe_load((DEPLOY / "vllm" / "compose.yaml").read_text())["services"]
    server, engine = services["server"], services["vllm"]
    given = flags_of([*entry_point(), *server["command"]])
    assert ((DEPLOY / "vllm" / server["build"]["context"]).resolve(), given.budget_ms) == (ROOT, 2000)
    assert (ROOT / server["build"]["dockerfile"]).is_file()
    mounts = dict(volume.rpartition(":ro")[0].rpartition(":")[::2] for volume in server["volumes"] if ":ro" in volume)
    assert mounts["./engines.yaml"] == given.engine and str(given.checkpoint) in mounts.values()
    fleet = read_fleet(str(DEPLOY / "vllm" / "engines.yaml"))
    (replica,) = fleet.replicas
    assert urlsplit(replica.url).hostname in services and replica.model_path in mounts.values()
    command = engine["command"]
    assert command[command.index("--served-model-name") + 1] == replica.model
    assert TRUST_FLAG in command and "ports" not in engine
    assert all(port.startswith("127.0.0.1:") for port in server["ports"])
    assert int(server["stop_grace_period"].removesuffix("s")) > GRACE_S


def test_the_unit_gives_flags_that_exist_and_time_to_finish():
    unit = configparser.RawConfigParser(strict=False)
    unit.optionxform = str
    unit.read(DEPLOY / "budgetvlm.service")
    service = unit["Service"]
    program, command, *flags = shlex.split(service["ExecStart"])
    assert (Path(program).name, command) == ("budgetvlm", "serve")
    assert flags_of(flags).state_dir == Path("${STATE_DIRECTORY}") and service["StateDirectory"]
    assert service["ExecReload"] == "/bin/kill -HUP $MAINPID"
    assert int(service["TimeoutStopSec"]) > GRACE_S
    assert service["RestartPreventExitStatus"] == "2", "mistakes in the flags are not mended by starting again"


@pytest.fixture(scope="module")
def samples():
    """Names of all samples of the server's metrics, and of the process."""
    options = ServeOptions()
    jobs = Dispatcher(options)
    families = list(ServerMetrics("reference", jobs, Gate(options)).registry.collect())
    endings = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}
    return {family.name + ending for family in families for ending in endings.get(family.type, ("",))}


def test_every_panel_of_the_board_shows_metrics_that_exist(samples):
    board = json.loads((DEPLOY / "grafana" / "board.json").read_text())
    named = set()
    for panel in board["panels"]:
        for target in panel["targets"]:
            assert target["expr"].count("(") == target["expr"].count(")")
            found = set(re.findall(r"\b(?:budgetvlm|process)_\w+", target["expr"]))
            assert found, panel["title"]
            named |= found
    assert named <= samples
    shown = {name.rsplit("_", 1)[0] if name.endswith(("_bucket", "_sum", "_count")) else name for name in named}
    assert {"budgetvlm_price", "budgetvlm_queue_length", "budgetvlm_settings_total"} <= shown
    places = [tuple(panel["gridPos"].values()) for panel in board["panels"]]
    assert len(set(places)) == len(places)


def test_grafana_finds_its_source_and_its_board():
    folder = DEPLOY / "grafana" / "provisioning"
    (source,) = yaml.safe_load((folder / "datasources" / "prometheus.yaml").read_text())["datasources"]
    board = json.loads((DEPLOY / "grafana" / "board.json").read_text())
    assert {panel["datasource"]["uid"] for panel in board["panels"]} == {source["uid"]}
    (provider,) = yaml.safe_load((folder / "dashboards" / "boards.yaml").read_text())["providers"]
    mounts = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["grafana"]["volumes"]
    assert any(mount.split(":")[1].startswith(provider["options"]["path"]) for mount in mounts)


def test_the_description_of_the_interface_names_errors_as_openai_words_them():
    document = make_app(ServeOptions()).openapi()
    for operations in document["paths"].values():
        for operation in operations.values():
            schema = operation["responses"]["default"]["content"]["application/json"]["schema"]
            assert schema["$ref"].endswith("/ErrorDocument") and "422" not in operation["responses"]
