"""Checkpoints: the files of torch's distributed checkpoint (DCP) behind a manifest, and a protocol that commits them.

    RUN/checkpoints/step-1200/                 manifest.json  .metadata  __0_0.distcp  __1_0.distcp …
    RUN/checkpoints/.step-1500.tmp-1f2e3d4c/   being written
    RUN/checkpoints/.step-900.del/             being deleted
    RUN/checkpoints/step-1500.bad-1767225600/  damaged, then overtaken by a newer save; the last two stay

A step exists once `.step-N.tmp-*` has been renamed to `step-N`; whatever dies before that changes nothing else. The
manifest lists every file with its size and SHA-256, so damage is found before anything is loaded. Tensors are stored
under their global names and shapes (`model.NAME`, `optimizer.NAME.exp_avg`, …), so any mesh reads what any other wrote.

DCP alone does neither: it loads flipped bits, casts dtypes silently, executes pickles, and its exceptions escape
`except Exception`. Every rank brings its own error to a vote, so one rank's error becomes the same CheckpointError on
all of them. Ranks share one file system.
"""
