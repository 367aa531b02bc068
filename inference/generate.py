#!/usr/bin/env python
"""Generate audio: the same as the `sa3-generate` command. `python inference/generate.py --help` lists the flags."""

from sa3train.cli.generate import main

if __name__ == "__main__":
    raise SystemExit(main())
