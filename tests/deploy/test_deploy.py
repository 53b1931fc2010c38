"""The deployment files, as far as they can be checked without an engine that runs them: by linters, and against what
the program itself says of its settings, its ports and its metrics."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from consumer.board import Board
from consumer.metrics import Metrics, PartitionStatus, Status
from consumer.rekey_metrics import RekeyMetrics, RekeyStatus
from consumer.settings import Settings, load_settings
from consumer.web import WebServer
from model.config import load

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
MANIFESTS = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
DASHBOARD = DEPLOY / "grafana" / "dashboards" / "log-anomaly.json"


def lint(command, *arguments):
    """Run a linter that is installed beside this Python."""
    done = subprocess.run(
        [Path(sys.executable).with_name(command), *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def documents(*paths):
    return [document for path in paths for document in yaml.safe_load_all(path.read_text())]


def manifest(kind, name=None):
    """Return the manifest of a kind, if there are several that of the consumers."""
    found = {item["metadata"]["name"]: item for item in documents(*MANIFESTS) if item["kind"] == kind}
    return found[name or ("log-anomaly" if len(found) > 1 else next(iter(found)))]


DEPLOYMENTS = ("log-anomaly", "log-anomaly-rekey")


@pytest.fixture
def consumers_settings(tmp_path, monkeypatch):
    """What the consumers of the Kubernetes manifests read."""
    monkeypatch.setenv("KAFKA_USERNAME", "somebody")
    monkeypatch.setenv("KAFKA_PASSWORD", "something")
    path = tmp_path / "config.yaml"
    path.write_text(manifest("ConfigMap")["data"]["config.yaml"])
    return load_settings(path)


def test_the_dockerfile_is_sound():
    lint("hadolint", DEPLOY / "Dockerfile")


def test_the_compose_file_is_sound():
    lint("check-jsonschema", "--builtin-schema", "vendor.compose-spec", DEPLOY / "compose.yaml")


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_the_manifests_are_sound(path):
    if path.name == "scaledobject.yaml":  # KEDA's own kinds: what its schema asks of them
        trigger_authentication, scaled = documents(path)
        assert {item["parameter"] for item in trigger_authentication["spec"]["secretTargetRef"]} >= {"password", "ca"}
        for trigger in scaled["spec"]["triggers"]:
            assert all(isinstance(value, str) for value in trigger["metadata"].values())
    else:
        lint("kubernetes-validate", "--strict", path)


def test_whatever_is_mounted_and_copied_is_there():
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    for service in compose["services"].values():
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            assert source in compose["volumes"] or source.startswith("$") or (DEPLOY / source).exists(), source
    kept = (DEPLOY / "Dockerfile.dockerignore").read_text()
    for sources in re.findall(r"^COPY (?!--from)(.+) \S+$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE):
        for source in sources.split():
            assert (ROOT / source).exists()
            assert f"\n!{source}\n" in kept


def test_settings_in_the_deployment_are_settings(consumers_settings):
    for settings in (load(DEPLOY / "config.yaml", Settings), consumers_settings):
        assert settings.metrics.listen == "0.0.0.0:9108"
    assert not consumers_settings.topics.create, "the rights of docs/security.md do not include it"


def test_image_probes_and_prometheus_agree_on_the_port():
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    assert "EXPOSE 9108" in dockerfile
    for name in DEPLOYMENTS:
        (container,) = manifest("Deployment", name)["spec"]["template"]["spec"]["containers"]
        assert container["ports"] == [{"name": "metrics", "containerPort": 9108}]
        for probe, path in (("startupProbe", "/healthz"), ("livenessProbe", "/healthz"), ("readinessProbe", "/readyz")):
            assert container[probe]["httpGet"] == {"path": path, "port": "metrics"}
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    scrapes = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())["scrape_configs"]
    assert [scrape["job_name"] for scrape in scrapes] == list(DEPLOYMENTS)
    for scrape in scrapes:
        assert scrape["dns_sd_configs"][0]["port"] == 9108
        assert scrape["dns_sd_configs"][0]["names"][0] in services


def test_the_rekeyer_is_told_to_be_one():
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    (container,) = manifest("Deployment", "log-anomaly-rekey")["spec"]["template"]["spec"]["containers"]
    for arguments in (services["rekey"]["command"], container["args"]):
        assert arguments[:2] == ["consumer", "--config"]
        assert arguments[3:] == ["--rekey"]


def test_the_healthcheck_tells_a_loop_that_runs_from_one_that_hangs():
    (command,) = re.findall(r"CMD (\[.*urlopen.*\])", (DEPLOY / "Dockerfile").read_text())
    metrics = Metrics()
    server = WebServer(metrics, Board(Settings()), "127.0.0.1:0")
    check = [part.replace("127.0.0.1:9108", server.address) for part in json.loads(command)]

    def healthy():
        return subprocess.run([sys.executable, *check[1:]], capture_output=True, check=False).returncode == 0

    metrics.beat()
    assert healthy()
    metrics._came_by -= 1000
    assert not healthy()
    server.close()
    assert not healthy()


def test_keda_scales_what_is_deployed_by_the_lag_of_its_group_up_to_its_partitions(consumers_settings):
    spec = manifest("ScaledObject")["spec"]
    assert spec["scaleTargetRef"]["name"] == manifest("Deployment")["metadata"]["name"]
    assert spec["maxReplicaCount"] == consumers_settings.topics.partitions
    (trigger,) = spec["triggers"]
    assert trigger["metadata"]["topic"] == consumers_settings.topics.events
    assert trigger["metadata"]["consumerGroup"] == consumers_settings.kafka.group
    assert trigger["metadata"]["bootstrapServers"] == consumers_settings.kafka.bootstrap
    assert trigger["metadata"]["allowIdleConsumers"] == "false"
    assert trigger["authenticationRef"]["name"] == manifest("TriggerAuthentication")["metadata"]["name"]


def test_the_consumers_score_on_as_many_threads_as_they_have_cpus():
    (container,) = manifest("Deployment")["spec"]["template"]["spec"]["containers"]
    (threads,) = (value for value in container["env"] if "THREADS" in value["name"])
    assert threads["valueFrom"]["resourceFieldRef"]["resource"] == "limits.cpu"
    scoring = (
        "from model.compiled import CompiledNetwork; from model.network import Autoencoder, Shape;"
        "print(CompiledNetwork(Autoencoder(Shape(6, 6, 16, 2, 1, 16)).eval())._threads)"
    )
    done = subprocess.run(
        [sys.executable, "-c", scoring], cwd=ROOT, env=os.environ | {threads["name"]: "3"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == "3\n"


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_what_pods_refer_to_exists(name):
    deployment = manifest("Deployment", name)
    pod, secret = deployment["spec"]["template"], manifest("Secret")
    assert deployment["spec"]["selector"]["matchLabels"] == pod["metadata"]["labels"]
    assert pod["metadata"]["labels"] == {"app.kubernetes.io/name": name}
    (let_in,) = manifest("NetworkPolicy")["spec"]["podSelector"]["matchExpressions"]
    assert name in let_in["values"]
    if name == "log-anomaly":
        assert manifest("PodDisruptionBudget")["spec"]["selector"]["matchLabels"] == pod["metadata"]["labels"]
    (container,) = pod["spec"]["containers"]
    sources = [value["valueFrom"] for value in container["env"]]
    asked = [source["secretKeyRef"] for source in sources if "secretKeyRef" in source]
    asked += [item for volume in pod["spec"]["volumes"] if "secret" in volume for item in volume["secret"]["items"]]
    asked += manifest("TriggerAuthentication")["spec"]["secretTargetRef"]
    for reference in asked:
        assert reference.get("name", secret["metadata"]["name"]) == secret["metadata"]["name"]
        assert reference["key"] in secret["stringData"]
    volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
    assert volumes.keys() == {mount["name"] for mount in container["volumeMounts"]}
    assert volumes["config"]["configMap"]["name"] == manifest("ConfigMap")["metadata"]["name"]
    claim = volumes["artifacts"]["persistentVolumeClaim"]["claimName"]
    assert claim == manifest("PersistentVolumeClaim")["metadata"]["name"]


def test_the_secret_is_a_form_without_a_secret():
    assert set(manifest("Secret")["stringData"].values()) == {""}
    for path in (*DEPLOY.rglob("*.yaml"), *DEPLOY.rglob("*.yml")):
        for value in re.findall(r"(?i)password: *(\S*)$", path.read_text(), re.MULTILINE):
            assert value.startswith("${") or value == '""', path.name


@pytest.fixture(scope="module")
def known_metrics():
    """The names of all series that a consumer with partitions shows, and a re-keyer."""
    metrics = Metrics()
    drift = {"tail": 0.1, "body": 0.1}
    partition = PartitionStatus(open_blocks=1, watermark=1, lag=1, catch_up=0, drift=drift, alarm=None)
    metrics.status = Status(
        alerts={"minor": 1},
        dead_letters={"other": 1},
        levels={"minor": 1.0},
        artifacts={"model": "m"},
        partitions={0: partition},
    )
    rekey = RekeyMetrics()
    rekey.status = RekeyStatus(pending={0: 1}, lag={0: 1})
    families = (*metrics.registry.collect(), *rekey.registry.collect())
    return {sample.name for family in families for sample in family.samples}


def queries(path):
    """Every PromQL expression of a dashboard or of a file of rules."""
    found = json.loads(path.read_text()) if path.suffix == ".json" else yaml.safe_load(path.read_text())

    def walk(item):
        if isinstance(item, dict):
            if isinstance(item.get("expr"), str):
                yield item["expr"]
            item = list(item.values())
        if isinstance(item, list):
            for part in item:
                yield from walk(part)

    return list(walk(found))


@pytest.mark.parametrize("path", [DASHBOARD, DEPLOY / "prometheus" / "alerts.yml"], ids=lambda path: path.name)
def test_every_metric_that_is_asked_for_exists(path, known_metrics):
    asked = {name for query in queries(path) for name in re.findall(r"\blog_anomaly_\w+", query)}
    assert len(asked) >= 5
    assert asked <= known_metrics, asked - known_metrics


def test_the_dashboard_says_what_each_panel_means_and_none_lies_on_another():
    panels = json.loads(DASHBOARD.read_text())["panels"]
    taken = set()
    for panel in panels:
        assert panel["title"]
        assert panel["description"]
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
    (source,) = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/prometheus.yaml").read_text())["datasources"]
    assert {panel["datasource"]["uid"] for panel in panels} == {source["uid"]}


def test_prometheus_takes_its_configuration_and_rules(prometheus):
    for arguments in (
        ("check", "config", DEPLOY / "prometheus" / "prometheus.yml"),
        ("test", "rules", DEPLOY / "prometheus" / "alerts.test.yml"),
    ):
        done = subprocess.run([prometheus / "promtool", *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
