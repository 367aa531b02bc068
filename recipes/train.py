"""Run `sa3-train` from an editor or debugger: python recipes/train.py recipe=style data=latents model=nano-base"""

import sys

from sa3train.cli.train import main

if __name__ == "__main__":
    sys.exit(main())
