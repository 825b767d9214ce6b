"""Packaging. The exact versions that the test suite ran on are in constraints.txt; here stand the ranges that may work."""

import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

STARTER = ("configs", "launch")

REQUIREMENTS = [
    "torch>=2.9",
    "torchvision>=0.24",
    "triton>=3.5; platform_system == 'Linux'",
    "transformers>=5.23",
    "peft>=0.21",
    "accelerate>=1.10",
    "bitsandbytes>=0.50",
    "deepspeed>=0.19",
    "ray[default,train]>=2.60",
    "webdataset>=1.0.2",
    "wandb>=0.30",
    "safetensors>=0.6",
    "tokenizers>=0.23",
    "numpy>=2",
    "pillow>=12",
    "simplejpeg>=1.9",
    "av>=14",
    "fsspec[http]>=2025.9",
    "pydantic>=2.12",
    "ruamel.yaml>=0.18",
    "braceexpand>=0.1.7",
    "rich>=14",
    "jinja2>=3.1",
    "jiwer>=4",
    "rapidfuzz>=3.9",
    "sacrebleu>=2.5",
    "matplotlib>=3.10",
]
DATASETS = ["datasets>=5"]
TRL = ["trl>=1.16", *DATASETS]
CHAT = ["gradio>=6"]
CIDER = ["pycocoevalcap>=1.2"]
DEVELOPMENT = [
    *TRL,
    *CHAT,
    *CIDER,
    "s3fs>=2025.9",
    "moto[s3]>=5",
    "flask>=3",
    "flask-cors>=6",
    "timm>=1.0.20",
    "pytest>=8",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.8",
    "hypothesis>=6",
    "ruff>=0.14",
    "pyright>=1.1.400",
    "build>=1.6",
    "dockerfile-parse>=2.0.1",
    "pre-commit>=4",
    "selenium>=4",
    "num2words>=0.5",
    "networkx>=3",
    "grimp>=3",
    "mkdocs-material>=9.8",
    "mkdocstrings[python]>=1",
    "mkdocs-jupyter>=0.26",
    "nbclient>=0.11",
    "nbformat>=5.11",
    "ipykernel>=7",
]


class BuildWithStarter(build_py):
    """A wheel brings configs/ and launch/ along as vlm_dist/starter/; a checkout, installed with -e too, has them at its top."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for name in STARTER:
            target = Path(self.build_lib, "vlm_dist", "starter", name)
            shutil.rmtree(target, ignore_errors=True)  # what an earlier build left
            shutil.copytree(name, target, ignore=shutil.ignore_patterns("__pycache__"))

    def get_source_files(self) -> list[str]:
        """What a source distribution holds: a wheel can be built from it too."""
        starter = [str(path) for name in STARTER for path in Path(name).rglob("*") if path.is_file() and path.suffix != ".pyc"]
        return [*super().get_source_files(), *starter]


setup(
    name="vlm_dist",
    version="0.1.0",
    description="Train vision-language models from tar shards, on one GPU or many, from one YAML",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*find_packages(include=["vlm_dist", "vlm_dist.*"]), "vlm_kernels"],
    # kernels/ itself is no package: an importable `kernels` would shadow Hugging Face's package of that name
    package_dir={"vlm_kernels": "kernels/vlm_kernels"},
    package_data={"vlm_dist.cli": ["*.yaml.j2"], "vlm_dist.reporting": ["*.html", "*.css"]},
    cmdclass={"build_py": BuildWithStarter},
    install_requires=REQUIREMENTS,
    extras_require={
        "dev": DEVELOPMENT,
        "trl": TRL,
        "chat": CHAT,
        "cider": CIDER,
        "datasets": DATASETS,
        "heif": ["pillow-heif>=1"],
        "s3": ["s3fs>=2025.9"],
        "gcs": ["gcsfs>=2025.9"],
    },
    entry_points={"console_scripts": ["vlm-dist=vlm_dist.cli.main:main"]},
)
