"""Encode a folder of audio, as `sa3-encode` does: python datasets/encode.py source=DIR out=DIR model=nano-base"""

import sys

from sa3train.cli.encode import main

if __name__ == "__main__":
    sys.exit(main())
