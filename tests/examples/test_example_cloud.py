import json
import re
import sys
from types import SimpleNamespace

import pytest
import small_runs  # noqa: F401  puts examples/ on the path
from cloud import create_vm

NEEDED = ["--project-id", "my-project", "--vm-name", "trainer"]
ALL = {
    "project_id": "my-project",
    "vm_name": "trainer",
    "disk_size": "300",
    "gpu_type": "nvidia-l4",
    "gpu_count": "4",
    "machine_type": "g2-standard-48",
    "zone": "europe-west4-b",
    "image_family": "my-family",
    "image_project": "my-images",
}


def dry_run(capsys, *flags):
    create_vm.main([*flags, "--dry-run"])
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("separator", ["-", "_"])
def test_dry_run_has_every_option(capsys, separator):
    request = dry_run(capsys, *(f"--{name.replace('_', separator)}={value}" for name, value in ALL.items()))
    assert (request["project"], request["zone"]) == ("my-project", "europe-west4-b")
    instance = request["instance_resource"]
    assert instance["name"] == "trainer"
    assert instance["machine_type"] == "zones/europe-west4-b/machineTypes/g2-standard-48"
    assert instance["scheduling"] == {"on_host_maintenance": "TERMINATE"}
    [gpus], [disk] = instance["guest_accelerators"], instance["disks"]
    assert gpus == {"accelerator_type": "zones/europe-west4-b/acceleratorTypes/nvidia-l4", "accelerator_count": 4}
    assert disk["boot"] and disk["auto_delete"]
    assert disk["initialize_params"] == {
        "source_image": "projects/my-images/global/images/family/my-family",
        "disk_size_gb": 300,
        "disk_type": "zones/europe-west4-b/diskTypes/pd-balanced",
    }


def test_defaults(capsys):
    request = dry_run(capsys, *NEEDED)
    assert request["zone"] == "us-central1-a"
    assert request["instance_resource"]["guest_accelerators"][0]["accelerator_count"] == 1
    assert "/deeplearning-platform-release/" in request["instance_resource"]["disks"][0]["initialize_params"]["source_image"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--project-id", "my-project"], "required: --vm-name"),
        ([*NEEDED, "--vm-name", "Trainer"], "--vm-name must be 1 to 63 lowercase letters, .*; got 'Trainer'"),
        ([*NEEDED, "--vm-name", "trainer-"], "--vm-name must be .*; got 'trainer-'"),
        ([*NEEDED, "--vm-name", "a" * 64], "--vm-name must be .*; got 'a{64}'"),
        ([*NEEDED, "--vm-name", "trainer\n"], "--vm-name must be .*; got 'trainer.n'"),
        ([*NEEDED, "--project_id", "mine"], "--project-id must be 6 to 30 .*; got 'mine'"),
        ([*NEEDED, "--gpu-type", "t4"], "--gpu-type must be a GPU such as nvidia-tesla-t4 .*; got 't4'"),
        ([*NEEDED, "--gpu-count", "0"], "--gpu-count must be at least 1; got 0"),
        ([*NEEDED, "--disk-size", "-5"], "--disk-size must be at least 1; got -5"),
        ([*NEEDED, "--disk-size", "100GB"], "--disk-size.*: invalid int value: '100GB'"),
        ([*NEEDED, "--machine-type", "8 cores"], "--machine-type must be a machine type such as n1-standard-8; got '8 cores'"),
        ([*NEEDED, "--zone", "us-central1"], "--zone must be a zone such as us-central1-a; got 'us-central1'"),
        ([*NEEDED, "--image-family", "../x"], "--image-family must be .*; got '../x'"),
    ],
)
def test_bad_flags_are_named(flags, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        create_vm.main([*flags, "--dry-run"])
    error = capsys.readouterr().err
    assert re.search(message, error), error


def test_missing_library_is_named(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "google.cloud", None)
    dry_run(capsys, *NEEDED)
    with pytest.raises(ImportError, match=r"google-cloud-compute: pip install google-cloud-compute"):
        create_vm.main(NEEDED)


def test_what_is_sent_is_what_the_dry_run_prints(capsys, monkeypatch):
    sent = []

    class InstancesClient:
        def insert(self, request):
            sent.append(request)
            return SimpleNamespace(result=lambda timeout: None)

    library = SimpleNamespace(InstancesClient=InstancesClient, InsertInstanceRequest=lambda fields: fields)
    monkeypatch.setitem(sys.modules, "google.cloud", SimpleNamespace(compute_v1=library))
    expected = dry_run(capsys, *NEEDED)
    create_vm.main(NEEDED)
    assert sent == [expected]
    assert "gcloud compute instances delete trainer --zone us-central1-a --project my-project" in capsys.readouterr().out


def test_request_has_the_librarys_fields():
    compute = pytest.importorskip("google.cloud.compute_v1")
    request = create_vm.build_request(create_vm.parse(NEEDED))
    assert compute.InsertInstanceRequest.to_dict(compute.InsertInstanceRequest(request))["instance_resource"]["name"] == "trainer"
