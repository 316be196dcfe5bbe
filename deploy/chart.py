"""Renders the chart with Helm's own library, checks it, and writes the plain manifests.

    chart.py check    lint, render with many values, check against every Kubernetes version
    chart.py write    write deploy/manifests
    chart.py render NAME NAMESPACE KUBERNETES_VERSION [VALUES_JSON]    to standard output

Called by `cargo xtask`, which knows where the packages are.
"""

import functools
import json
import sys
from pathlib import Path

import yaml
from helm_python import Chart, _native, lint
from kubernetes_validate import utils as schemas

HERE = Path(__file__).resolve().parent
CHART = HERE / "chart" / "shunt"
MANIFESTS = HERE / "manifests"

# The oldest that the chart is for; the newest is whatever the schemas go to.
OLDEST = (1, 25)
# The first whose pods have a field for AppArmor.
APP_ARMOR_FIELD = (1, 30)

# What the agent may do, and no more: a change here is a change of docs/kubernetes.md.
CAPABILITIES = {"BPF", "NET_ADMIN", "NET_BROADCAST", "PERFMON", "SYS_ADMIN", "SYS_PTRACE"}
RIGHTS = {
    ("", "pods"): {"get", "list", "watch"},
    ("", "events"): {"create"},
}
HOST_PATHS = {
    "/sys/fs/bpf",
    "/sys/fs/cgroup",
    "/run/netns",
    "/run/shunt",
    "/opt/cni/bin",
    "/etc/cni/net.d",
}

# Each is rendered and checked for every version of Kubernetes.
CASES = {
    "defaults": {},
    "privileged": {"privileged": True},
    "without the plugin": {"cni": {"enabled": False}},
    "uninstall when stopped": {"uninstallOnStop": True},
    "hybrid cgroups and other directories": {
        "node": {"cgroup": "/sys/fs/cgroup/unified", "netns": "/run/docker/netns"},
        "cni": {"binDir": "/home/kubernetes/bin", "confDir": "/var/lib/cni"},
    },
    "monitored": {
        "podMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
        "serviceMonitor": {"enabled": True},
        "dashboard": {"enabled": True, "namespace": "monitoring"},
        "alerts": {"enabled": True, "labels": {"release": "prometheus"}},
        "networkPolicy": {
            "from": [{"namespaceSelector": {"matchLabels": {"name": "monitoring"}}}]
        },
    },
    "somebody else's account": {
        "serviceAccount": {"create": False, "name": "agent"},
        "rbac": {"create": False},
        "networkPolicy": {"enabled": False},
    },
    "an image by its digest": {
        "image": {"repository": "registry.example:5000/a/shunt", "digest": "sha256:" + "0" * 64},
        "imagePullSecrets": [{"name": "registry"}],
    },
    "everything that is empty": {
        "excludeNamespaces": [],
        "tolerations": [],
        "nodeSelector": None,
        "resources": None,
        "seccompProfile": None,
        "priorityClassName": "",
    },
    "everything that can be added": {
        "extraCapabilities": ["DAC_OVERRIDE"],
        "seLinuxOptions": {"type": "spc_t"},
        "podLabels": {"team": "network"},
        "podAnnotations": {"note": "yes"},
        "extraArgs": ["--dual-stack"],
        "extraEnv": [{"name": "A", "value": "b"}],
        "affinity": {"nodeAffinity": {}},
        "maxUnavailable": "10%",
        "http": {"address": "[::]", "port": 9000},
        "serviceAccount": {"annotations": {"a": "b"}},
    },
}

# Values that have to be refused, and what the refusal names.
REFUSED = {
    "splice": {"splice": "some"},
    "tag": {"image": {"tag": "a b"}},
    "digest": {"image": {"digest": "sha256:1"}},
    "port": {"http": {"port": 70000}},
    "binDir": {"cni": {"binDir": "opt/cni/bin"}},
    "extraCapabilities": {"extraCapabilities": ["CAP_SYS_ADMIN"]},
    "appArmor": {"appArmor": True},
    "misspelt": {"misspelt": 1},
    "maxUnavailable": {"maxUnavailable": 0},
}


class Failed(Exception):
    """A check that did not hold; the text says which."""


def expect(condition, what):
    if not condition:
        raise Failed(what)


def render(chart, name, namespace, version, values):
    """The documents of each template, as text, for a version such as (1, 30)."""
    options = {"name": name, "namespace": namespace, "kube_version": "v%d.%d.0" % version}
    # Chart.render() has no parameter for the version; its library has.
    rendered = _native.call_string(
        "helm_render", chart._raw(), json.dumps(values), json.dumps(options)
    )
    texts = json.loads(rendered)
    return {
        path.rpartition("/")[2]: text
        for path, text in texts.items()
        if text.strip() and not path.endswith("NOTES.txt")
    }


# Most texts are the same for every version of Kubernetes, and reading YAML is slow.
@functools.lru_cache(maxsize=None)
def loaded(text):
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return [document for document in yaml.load_all(text, Loader=loader) if document]


def documents(texts):
    return [document for text in texts.values() for document in loaded(text)]


def of_kind(docs, kind):
    return [document for document in docs if document["kind"] == kind]


def versions():
    known = [tuple(map(int, text.split(".")[:2])) for text in schemas.all_versions()]
    return sorted(version for version in known if version >= OLDEST)


# Reading a schema takes longer than using it.
schemas.schema_contents = functools.lru_cache(maxsize=None)(schemas.schema_contents)


@functools.lru_cache(maxsize=None)
def fits(document, version):
    """Checks one document (as JSON) against the schemas of Kubernetes, strictly."""
    document = json.loads(document)
    if document["apiVersion"].startswith("monitoring.coreos.com/"):
        return  # A custom resource; Kubernetes has no schema of it.
    schemas.validate(document, "%d.%d.0" % version, strict=True)


def check_schemas(docs, version):
    for document in docs:
        what = "%s %s" % (document["kind"], document["metadata"]["name"])
        try:
            fits(json.dumps(document, sort_keys=True), version)
        except schemas.ValidationError as error:
            path = ".".join(map(str, error.path))
            raise Failed("%s: %s: %s" % (what, path, error.message)) from error


def pod_of(docs):
    (daemon_set,) = of_kind(docs, "DaemonSet")
    spec = daemon_set["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    return daemon_set, spec, container


def has_empty(value):
    """Whether a field was left without a value, which a template does easily."""
    if isinstance(value, dict):
        return any(map(has_empty, value.values()))
    if isinstance(value, list):
        return any(map(has_empty, value))
    return value is None


def check_always(docs):
    """What holds whatever the values."""
    _, spec, container = pod_of(docs)
    security = container["securityContext"]
    expect(security["readOnlyRootFilesystem"], "the root file system can be written")
    expect(spec["hostPID"] and spec["hostNetwork"], "the node's processes are not seen")
    expect(spec["enableServiceLinks"] is False, "the environment has service links")
    expect(not spec.get("hostIPC"), "the node's IPC is shared")
    expect("initContainers" not in spec, "there is another container")
    expect(container["args"][:2] == ["run", "--kubernetes"], "it does not run the agent")
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    expect(set(volumes) == mounts, "volumes and mounts differ")
    expect(all(set(v) == {"name", "hostPath"} for v in volumes.values()), "another volume")
    for document in docs:
        expect(document["kind"] != "Secret", "there is a secret")
        expect(not has_empty(document), "%s has an empty field" % document["kind"])
    for role in of_kind(docs, "ClusterRole") + of_kind(docs, "Role"):
        check_rights(role["rules"])
    selector = of_kind(docs, "DaemonSet")[0]["spec"]["selector"]["matchLabels"]
    expect(
        set(selector) == {"app.kubernetes.io/name", "app.kubernetes.io/instance"},
        "the selector has changed, and Kubernetes refuses that in an upgrade",
    )


def check_rights(rules):
    rights = {}
    for rule in rules:
        expect(set(rule) == {"apiGroups", "resources", "verbs"}, "a rule has other fields")
        for group in rule["apiGroups"]:
            for resource in rule["resources"]:
                rights.setdefault((group, resource), set()).update(rule["verbs"])
    expect(rights == RIGHTS, "the rights are %r" % rights)


def check_privileges(docs, values):
    _, spec, container = pod_of(docs)
    security = container["securityContext"]
    privileged = values.get("privileged", False)
    expect(security["privileged"] is privileged, "privileged is not what was asked for")
    propagation = {m.get("mountPropagation") for m in container["volumeMounts"]}
    # The API server refuses it in a container that is not privileged.
    expect(("Bidirectional" in propagation) is privileged, "Bidirectional mounts")
    if privileged:
        return
    added = set(security["capabilities"]["add"])
    expect(security["capabilities"]["drop"] == ["ALL"], "capabilities are kept")
    extra = set(values.get("extraCapabilities", []))
    expect(added == CAPABILITIES | extra, "the capabilities are %r" % sorted(added))
    expect(security["allowPrivilegeEscalation"] is False, "privileges can be gained")
    if values.get("seccompProfile", {}) is not None:
        expect(security["seccompProfile"] == {"type": "RuntimeDefault"}, "no seccomp profile")


def check_defaults(docs):
    daemon_set, spec, container = pod_of(docs)
    kinds = sorted(document["kind"] for document in docs)
    expect(
        kinds
        == ["ClusterRole", "ClusterRoleBinding", "DaemonSet", "NetworkPolicy", "ServiceAccount"],
        "the kinds are %r" % kinds,
    )
    paths = {volume["hostPath"]["path"] for volume in spec["volumes"]}
    expect(paths == HOST_PATHS, "the directories of the node are %r" % sorted(paths))
    expect(spec["dnsPolicy"] == "ClusterFirstWithHostNet", "cluster names do not resolve")
    expect(spec["tolerations"] == [{"operator": "Exists"}], "some nodes are left out")
    expect(spec["priorityClassName"] == "system-node-critical", "it can be evicted")
    rolling = daemon_set["spec"]["updateStrategy"]["rollingUpdate"]
    expect(rolling == {"maxUnavailable": 1}, "more than one node at once")
    stops = [arg for arg in container["args"] if "uninstall" in arg]
    expect(not stops and "lifecycle" not in container, "an update takes redirection away")
    requests = container["resources"]["requests"]
    expect(set(requests) == {"cpu", "memory"}, "no requests")
    expect({"livenessProbe", "readinessProbe"} <= set(container), "no probes")
    (account,) = of_kind(docs, "ServiceAccount")
    expect(account["automountServiceAccountToken"] is False, "the token is for everybody")
    (policy,) = of_kind(docs, "NetworkPolicy")
    expect(policy["spec"]["ingress"] == [{"ports": [{"port": "http", "protocol": "TCP"}]}], "policy")


def check_app_armor(docs, version):
    daemon_set, _, container = pod_of(docs)
    annotations = daemon_set["spec"]["template"]["metadata"].get("annotations", {})
    annotated = "container.apparmor.security.beta.kubernetes.io/shunt" in annotations
    field = "appArmorProfile" in container["securityContext"]
    newer = version >= APP_ARMOR_FIELD
    expect((field, annotated) == (newer, not newer), "AppArmor")


def check_cases(docs):
    """What single cases are there for."""
    _, _, container = pod_of(docs["uninstall when stopped"])
    expect("--uninstall-on-stop" in container["args"], "nothing is uninstalled")
    _, spec, container = pod_of(docs["without the plugin"])
    flags = [arg for arg in container["args"] if "cni" in arg]
    expect(flags == ["--no-cni"], "the flags are %r" % flags)
    expect(not any("cni" in volume["name"] for volume in spec["volumes"]), "CNI directories")
    _, _, container = pod_of(docs["an image by its digest"])
    expect(
        container["image"] == "registry.example:5000/a/shunt@sha256:" + "0" * 64,
        "the image is " + container["image"],
    )
    _, _, container = pod_of(docs["defaults"])
    expect(container["image"].startswith("localhost/shunt:"), "the image is " + container["image"])
    monitored = docs["monitored"]
    (config,) = of_kind(monitored, "ConfigMap")
    json.loads(config["data"]["shunt.json"])
    (rule,) = of_kind(monitored, "PrometheusRule")
    expect(rule["spec"]["groups"], "there are no alerts")
    expect(len(of_kind(monitored, "PodMonitor")) == 1, "no PodMonitor")
    expect(len(of_kind(monitored, "ServiceMonitor")) == 1, "no ServiceMonitor")
    _, spec, _ = pod_of(docs["somebody else's account"])
    expect(spec["serviceAccountName"] == "agent", "another account")


def check_refusals(chart):
    for name, values in REFUSED.items():
        try:
            render(chart, "shunt", "kube-system", OLDEST, values)
        except Exception as error:  # of the library, which has several
            expect(name in str(error), "the refusal of %s does not name it: %s" % (name, error))
        else:
            raise Failed("%r was not refused" % values)


def check_lint():
    report = lint(str(CHART), strict=True)
    # A chart without an icon is what it complains about, at the level of a remark.
    bad = [m for m in report["messages"] if m["severity"] >= 2]
    expect(not bad and not report["errors"], "helm lint: %s" % (bad or report["errors"]))


def check_version():
    """The chart's versions are those of the agent."""
    cargo = (HERE.parent / "Cargo.toml").read_text()
    wanted = cargo.partition("[workspace.package]")[2].partition('version = "')[2].partition('"')[0]
    about = yaml.safe_load((CHART / "Chart.yaml").read_text())
    found = {about["version"], about["appVersion"]}
    expect(found == {wanted}, "Chart.yaml has %s, Cargo.toml %s" % (sorted(found), wanted))


def check_values():
    """The schema knows the values that there are, so that a misspelt one is refused."""
    schema = json.loads((CHART / "values.schema.json").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    known = set(schema["properties"]) - {"global"}
    expect(set(values) == known, "values.yaml and its schema differ: %r" % (set(values) ^ known))


def manifests(chart):
    """The plain manifests: file name → text."""
    written = {}
    for name, version in [("shunt.yaml", versions()[-1]), ("shunt-before-1.30.yaml", OLDEST)]:
        texts = render(chart, "shunt", "kube-system", version, {})
        head = (
            "# Made from deploy/chart/shunt by `cargo xtask manifests`; do not edit.\n"
            "# For Kubernetes %s. `image` has to be where your nodes find it.\n"
            % ("1.30 and newer" if name == "shunt.yaml" else "1.25 to 1.29")
        )
        helm_only = ("helm.sh/chart:", "app.kubernetes.io/managed-by:")
        parts = []
        for text in (texts[key] for key in sorted(texts)):
            lines = [line.rstrip() for line in text.strip().splitlines()]
            kept = [line for line in lines if not line.lstrip().startswith(helm_only)]
            parts.append("\n".join(kept).removeprefix("---\n"))
        written[name] = head + "".join("---\n%s\n" % part for part in parts)
    return written


def check_manifests(chart):
    for name, text in manifests(chart).items():
        path = MANIFESTS / name
        found = path.read_text() if path.exists() else ""
        expect(found == text, "deploy/manifests/%s is old; run `cargo xtask manifests`" % name)
    extra = {path.name for path in MANIFESTS.iterdir()} - set(manifests(chart))
    expect(not extra, "nobody writes deploy/manifests/%s" % ", ".join(sorted(extra)))


def check(chart):
    check_version()
    check_values()
    check_lint()
    check_refusals(chart)
    count = 0
    for version in versions():
        docs = {}
        for name, values in CASES.items():
            try:
                docs[name] = documents(render(chart, "shunt", "kube-system", version, values))
                check_always(docs[name])
                check_privileges(docs[name], values)
                check_app_armor(docs[name], version)
                check_schemas(docs[name], version)
            except Failed as failure:
                raise Failed("%s, Kubernetes %d.%d: %s" % (name, *version, failure)) from failure
            count += len(docs[name])
        check_defaults(docs["defaults"])
        check_cases(docs)
    check_manifests(chart)
    span = "%d.%d to %d.%d" % (*versions()[0], *versions()[-1])
    print("chart: %d manifests are good for Kubernetes %s" % (count, span))


def main(arguments):
    chart = Chart.load(str(CHART))
    if arguments == ["check"]:
        check(chart)
    elif arguments == ["write"]:
        MANIFESTS.mkdir(exist_ok=True)
        for name, text in manifests(chart).items():
            (MANIFESTS / name).write_text(text)
            print("written: deploy/manifests/" + name)
    elif len(arguments) in (4, 5) and arguments[0] == "render":
        version = tuple(map(int, arguments[3].split(".")[:2]))
        values = json.loads(arguments[4]) if len(arguments) == 5 else {}
        for text in render(chart, arguments[1], arguments[2], version, values).values():
            print("---\n" + text.strip().removeprefix("---\n"))
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except Failed as failure:
        sys.exit("error: " + str(failure))
