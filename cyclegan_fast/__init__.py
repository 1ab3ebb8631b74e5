"""cyclegan_fast: unpaired image-to-image translation, trained and used fast."""

from cyclegan_fast.version import __version__ as __version__
