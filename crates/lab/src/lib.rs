//! Several nodes, a switch and an outside on one machine, as namespaces with a cgroup subtree each.
