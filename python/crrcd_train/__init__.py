"""A thin training loop over the public API of crrcd_ext: data, models, methods, studies, reports.

The command line is `crrcd-train` (or `python -m crrcd_train`); see `crrcd-train --help`.
"""
