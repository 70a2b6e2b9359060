from pathlib import Path

from setuptools import find_packages, setup

root = Path(__file__).parent
readme = root / "README.md"
version = (root / "linear_moe" / "__init__.py").read_text().partition('__version__ = "')[2].partition('"')[0]

setup(
    name="linear-moe",
    version=version,
    description="Pretrain, export and serve language models of linear sequence modelling and mixture of experts",
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["linear_moe", "linear_moe.*"]),
    package_data={"linear_moe": ["py.typed", "modeling/ops/tuned/*.json"]},
    install_requires=[
        "torch>=2.10",
        "megatron-core>=0.16.1,<0.20",
        "pyyaml",
        "numpy",
        "transformers>=5",
        "tokenizers",
        "safetensors",
        "rich",
        "tensorboard",
        "psutil",
    ],
    extras_require={
        # not flash-linear-attention, which brings fla's layers and models: they double the time of a first step
        "gpu": ["triton; platform_system == 'Linux'", "fla-core>=0.6"],
        # GEMMs for model.moe.experts=quack; their arguments change between its minor versions
        "quack": ["quack-kernels~=0.3.11; platform_system == 'Linux'"],
        "dev": ["pytest", "pytest-timeout", "pytest-xdist", "ruff", "mypy", "types-PyYAML"],
    },
    entry_points={"console_scripts": ["linear-moe = linear_moe.cli:main"]},
)
