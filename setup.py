from pathlib import Path

from setuptools import find_packages, setup

version = next(
    line.split('"')[1]
    for line in Path(__file__).with_name("sdt_blocks").joinpath("__init__.py").read_text().splitlines()
    if line.startswith("__version__")
)

train = ["accelerate>=1.2", "omegaconf>=2.3", "timm>=1.0.12", "torchvision", "scikit-learn", "matplotlib>=3.7"]
train += ["tensorboard", "torchmetrics>=1.6"]
events = ["tonic>=1.5", "aedat>=2.0"]
data = ["datasets>=4", "mlxtend>=0.23", "webdataset>=0.2.86"]
test = [*data, "pytest>=8", "pytest-xdist", "hypothesis", "mypy", "ruff", "dv-processing", "neurobench", "types-PyYAML"]
test += ["spikingjelly>=2.0"]

setup(
    name="sdt_blocks",
    version=version,
    description="Spike-Driven Transformer building blocks on snnTorch",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    # `datasets/` is installed under another name: as `datasets` it would shadow the Hugging Face package.
    packages=[*find_packages(include=["sdt_blocks", "sdt_blocks.*"]), "sdt_datasets"],
    package_dir={"sdt_datasets": "datasets"},
    package_data={"sdt_blocks": ["py.typed", "ops/cpu/*.cpp", "ops/cpu/*.h", "example/*.*"]},
    install_requires=[
        "torch>=2.6",
        "snntorch>=0.9.4",
        "triton>=3.2; platform_system == 'Linux'",
        "einops>=0.8",
        "numpy",
        "safetensors>=0.4",
        "rich>=13",
        *train,
        *events,
    ],
    extras_require={
        "data": data,
        "test": test,
        "bench": ["spikingjelly>=2.0"],
    },
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
