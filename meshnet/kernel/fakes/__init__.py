"""The kernel in memory: verified fakes that pass the contract tests of the real one."""
