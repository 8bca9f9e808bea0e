from pathlib import Path

from setuptools import find_packages, setup

version = next(
    line.split('"')[1]
    for line in Path(__file__).with_name("sdt_blocks").joinpath("__init__.py").read_text(encoding="utf-8").splitlines()
    if line.startswith("__version__")
)

analysis = ["matplotlib>=3.7", "omegaconf>=2.3", "scipy"]
recipes = [*analysis, "accelerate>=1.2", "pyyaml", "psutil", "pillow", "scikit-learn", "tensorboard"]
recipes += ["timm>=1.0.12", "torchmetrics>=1.6", "torchvision"]
events = ["tonic>=1.5", "aedat>=2.0"]
export = ["onnx>=1.17", "onnxscript>=0.2", "onnxruntime>=1.20", "nir>=1.0"]
data = ["datasets>=4", "mlxtend>=0.23", "webdataset>=0.2.86"]
everything = [*recipes, *events, *export, *data, "huggingface_hub>=0.24"]
test = [*everything, "pytest>=8", "pytest-xdist", "hypothesis", "mypy", "ruff", "dv-processing", "h5py", "neurobench"]
test += ["nirtorch>=2.0", "spikingjelly>=2.0", "transformers>=5", "types-PyYAML", "wheel"]
docs = ["mkdocs>=1.6,<2", "mkdocs-material>=9.7,<10", "mkdocstrings-python>=2.0,<3", "ruff"]

setup(
    name="sdt_blocks",
    version=version,
    description="Spike-Driven Transformer building blocks on snnTorch",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    # Installed under other names: as `datasets` one folder would shadow the Hugging Face package.
    packages=[
        *find_packages(include=["sdt_blocks", "sdt_blocks.*"]),
        "sdt_datasets",
        "sdt_recipes",
        "sdt_recipes.common",
    ],
    package_dir={"sdt_datasets": "datasets", "sdt_recipes": "recipes"},
    package_data={
        "sdt_blocks": ["py.typed", "ops/cpu/*.cpp", "ops/cpu/*.h", "example/*.*"],
        "sdt_recipes": ["README.md", "configs/*.yaml", "accelerate/*.yaml", "data/*"],
    },
    entry_points={"console_scripts": ["sdt = sdt_recipes.sdt:main"]},
    install_requires=[
        "torch>=2.6",
        "snntorch>=0.9.4",
        "triton>=3.2; platform_system == 'Linux'",
        "einops>=0.8",
        "numpy",
        "safetensors>=0.4",
        "rich>=13",
    ],
    extras_require={
        "recipes": recipes,
        "events": events,
        "analysis": analysis,
        "export": export,
        "data": data,
        "timm": ["timm>=1.0.12"],
        "hub": ["huggingface_hub>=0.24"],
        "all": everything,
        "test": test,
        "docs": docs,
        "bench": ["spikingjelly>=2.0", "matplotlib>=3.7", "scikit-learn"],
    },
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
