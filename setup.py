"""Packaging of mmseg_volo. The version lives in mmseg_volo/version.py and nowhere else."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r"__version__ = '(.+)'", (ROOT / 'mmseg_volo/version.py').read_text(encoding='utf-8'))[1]

# The OpenMMLab line that is maintained today; imported as mmengine, mmcv and mmseg.
OPENMMLAB = ['onedl-mmengine>=0.10.10', 'onedl-mmcv>=2.3.0', 'onedl-mmsegmentation>=1.4.0']
DATA = ['cityscapesscripts>=2.2']
EXPORT = ['onnx>=1.17', 'onnxscript>=0.5', 'onnxruntime>=1.20']
OPENVINO = ['openvino>=2026.4']  # the oldest that was seen to refuse weights outside of the file's folder
IMPORT = ['pycocotools>=2.0.8']
DEMO = ['gradio>=6.31,<7']
GEO = ['rasterio>=1.4']  # has GDAL in it
DOCS = ['sphinx>=8', 'myst-parser>=4', 'furo', 'sphinx-copybutton']
TENSORBOARD, WANDB = ['tensorboard'], ['wandb']
TEST = ['pytest>=8', 'pytest-xdist', 'parameterized', *DATA, *IMPORT, *EXPORT, *DEMO, *DOCS, *TENSORBOARD, *GEO]

setup(
    name='mmseg_volo',
    version=VERSION,
    description='Semantic segmentation with VOLO (Vision Outlooker) on MMSegmentation',
    long_description=(ROOT / 'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    packages=find_packages(include=['mmseg_volo', 'mmseg_volo.*']),
    package_data={'mmseg_volo.report': ['*.css', '*.html'], 'mmseg_volo.publish': ['*.jinja']},
    python_requires='>=3.10',
    install_requires=[
        'torch>=2.6',
        'torchvision',
        'timm>=1.0.9',
        *OPENMMLAB,
        'opencv-python',
        'av>=17',
        'numba>=0.61',
        'numpy',
        'scipy',
        'pillow',
        'matplotlib',
        'jinja2',
        'safetensors',
        'huggingface_hub>=0.34',  # the oldest with the command that the messages name, hf auth login
        'prettytable',
        'rich',
        'tqdm',
    ],
    extras_require={
        'data': DATA,
        'import': IMPORT,
        'export': EXPORT,
        'openvino': OPENVINO,
        'demo': DEMO,
        'docs': DOCS,
        'geo': GEO,
        'tensorboard': TENSORBOARD,
        'wandb': WANDB,
        'test': TEST,
        'dev': [*TEST, 'ruff==0.17.*', 'import-linter', 'playwright'],
    },
)
