#!/usr/bin/env python3
"""Make a Google Cloud virtual machine with GPUs to train on.

    pip install google-cloud-compute
    gcloud auth application-default login    # once
    python examples/cloud/create_vm.py --project-id my-project --vm-name trainer --gpu-type nvidia-tesla-t4 --gpu-count 4

With `--dry-run` the request is printed as JSON and nothing is made or needed. Flags may be spelled with underscores too (`--project_id`).
"""

import argparse
import json
import re
import sys

LABEL = (
    r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?",
    "1 to 63 lowercase letters, digits and hyphens that start with a letter and end with no hyphen",
)
PROJECT = (
    r"([a-z0-9.-]+:)?[a-z][-a-z0-9]{4,28}[a-z0-9]",
    "6 to 30 lowercase letters, digits and hyphens that start with a letter and end with no hyphen",
)
# What Compute Engine takes as a name: the pattern, and the same in words. Whether such a thing exists it knows itself.
NAMES = {
    "project_id": PROJECT,
    "vm_name": LABEL,
    "gpu_type": (r"nvidia(-[a-z0-9]+)+", "a GPU such as nvidia-tesla-t4 or nvidia-l4"),
    "machine_type": (r"[a-z][a-z0-9]*(-[a-z0-9]+)+", "a machine type such as n1-standard-8"),
    "zone": (r"[a-z]+-[a-z]+[0-9]+-[a-z]", "a zone such as us-central1-a"),
    "image_family": LABEL,
    "image_project": PROJECT,
}
TIMEOUT = 600  # seconds; a machine takes about one minute


def main(argv: list[str] | None = None) -> None:
    """Do what `argv` says."""
    args = parse(argv)
    request = build_request(args)
    if args.dry_run:
        print(json.dumps(request, indent=2))
        return
    create(request)
    place = f"{args.vm_name} --zone {args.zone} --project {args.project_id}"
    print(f"made. To enter it: gcloud compute ssh {place}\nIt costs money until: gcloud compute instances delete {place}")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The options of `argv`, checked. A bad value ends the process with a message that names the flag."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def add(name, text, **options):
        default = f" (default: {options['default']})" if "default" in options else ""
        spellings = dict.fromkeys((f"--{name}", f"--{name.replace('-', '_')}"))
        parser.add_argument(*spellings, help=text + default, **options)

    add("project-id", "project that pays", required=True)
    add("vm-name", "name of the machine", required=True)
    add("disk-size", "GB of the boot disk", type=int, default=200)
    add("gpu-type", "GPU", default="nvidia-tesla-t4")
    add("gpu-count", "number of GPUs", type=int, default=1)
    add("machine-type", "processors and memory; must be one that the GPU goes with", default="n1-standard-8")
    add("zone", "where; must have that GPU", default="us-central1-a")
    # Families are retired with their CUDA: gcloud compute images list --project deeplearning-platform-release --no-standard-images
    add("image-family", "operating system: an image with CUDA and PyTorch", default="pytorch-2-9-cu129-ubuntu-2204-nvidia-580")
    add("image-project", "project the image belongs to", default="deeplearning-platform-release")
    add("dry-run", "print the request and stop", action="store_true")
    args = parser.parse_args(argv)
    for name, (pattern, words) in NAMES.items():
        if not re.fullmatch(pattern, getattr(args, name)):
            parser.error(f"--{name.replace('_', '-')} must be {words}; got {getattr(args, name)!r}")
    for name in ("disk_size", "gpu_count"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1; got {getattr(args, name)}")
    return args


def build_request(args: argparse.Namespace) -> dict:
    """The fields of a `compute_v1.InsertInstanceRequest` for these options, by its names."""
    zone = f"zones/{args.zone}"
    disk = {
        "source_image": f"projects/{args.image_project}/global/images/family/{args.image_family}",
        "disk_size_gb": args.disk_size,
        "disk_type": f"{zone}/diskTypes/pd-balanced",
    }
    instance = {
        "name": args.vm_name,
        "machine_type": f"{zone}/machineTypes/{args.machine_type}",
        "disks": [{"boot": True, "auto_delete": True, "initialize_params": disk}],
        "guest_accelerators": [{"accelerator_type": f"{zone}/acceleratorTypes/{args.gpu_type}", "accelerator_count": args.gpu_count}],
        # Machines with GPUs cannot migrate: Compute Engine refuses any other value.
        "scheduling": {"on_host_maintenance": "TERMINATE"},
        "network_interfaces": [{"network": "global/networks/default", "access_configs": [{"type_": "ONE_TO_ONE_NAT"}]}],
        # Deep Learning images install the driver at their first start when told so here.
        "metadata": {"items": [{"key": "install-nvidia-driver", "value": "True"}]},
    }
    return {"project": args.project_id, "zone": args.zone, "instance_resource": instance}


def create(request: dict) -> None:
    """Send `request` and wait until the machine runs."""
    try:
        from google.cloud import compute_v1
    except ImportError as error:
        raise ImportError("making a machine needs google-cloud-compute: pip install google-cloud-compute") from error
    compute_v1.InstancesClient().insert(compute_v1.InsertInstanceRequest(request)).result(timeout=TIMEOUT)


if __name__ == "__main__":
    sys.exit(main())
