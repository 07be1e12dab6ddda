"""Stands for torchvision, which SGLang imports for models with images; those do not run here."""

from absent import absent, submodules

__version__ = "0"
__getattr__ = absent
submodules(__name__)
