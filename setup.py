"""Packaging of LongTake. Packages are named one by one: the folder also holds videos, weights and tests."""

from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent


def requirements(name: str) -> list[str]:
    """The requirement lines of a pip file, comments left out."""
    lines = (line.split("#")[0].strip() for line in (HERE / name).read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line]


setup(
    name="longtake",
    version="0.1.0",
    description="Causal, streaming Wan video generation: inference and self-forcing training",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=["configs", "model", "pipeline", "trainer", "utils", "wan", "wan.modules", "world"],
    py_modules=["inference", "demo", "train"],
    package_data={"configs": ["*.yaml"], "world": ["weights/*"]},
    install_requires=requirements("requirements.txt"),
    extras_require={
        "train": ["wandb"],
        "demo": ["gradio>=6,<7"],
        "dev": ["pytest>=8", "pytest-timeout", "ruff"],
    },
)
