// The programs of the eBPF mode. None of them calls a helper that the kernel reserves for GPL programs.
#include "connect.h"
#include "packet.h"
#include "talk.h"

char terms[] SEC("license") = "Apache-2.0";
