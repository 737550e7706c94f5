"""What users add from outside of the package, as they would write it: one file each, shown in docs/extend.md."""
