"""A class of submissions: found, unpacked, run in a sandbox, judged in another process."""
