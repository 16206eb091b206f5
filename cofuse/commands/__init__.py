"""Commands by noun: each module is one sub-command of `cofuse`, loaded when it is called."""
