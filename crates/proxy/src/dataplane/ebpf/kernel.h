// The kernel's side of the contract: context types from the UAPI headers, the helper functions that are called, and how a
// map is declared in BTF. Helper numbers are those of `enum bpf_func_id`.
#pragma once

#include <stddef.h>
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/pkt_cls.h>

#define SEC(name) __attribute__((section(name), used))
#define inlined static __attribute__((always_inline)) inline
// A function of its own: the verifier checks it with a stack frame of its own.
#define separate static __attribute__((noinline))

// Clang reads key, value and settings of a map from the types of these members.
#define INTEGER(name, value) int (*name)[value]
#define TYPE(name, type) __typeof__(type) *name
#define PIN_BY_NAME 1

#define big16(number) __builtin_bswap16(number)

#define HELPER(number, result, name, ...) static result (*const name)(__VA_ARGS__) = (void *)(number)
HELPER(1, void *, map_lookup, void *map, const void *key);
HELPER(2, long, map_update, void *map, const void *key, const void *value, __u64 flags);
HELPER(3, long, map_delete, void *map, const void *key);
HELPER(5, __u64, now_ns, void);
HELPER(7, __u32, random32, void);
HELPER(9, long, store_bytes, struct __sk_buff *packet, __u32 offset, const void *from, __u32 length, __u64 flags);
HELPER(10, long, replace_l3_checksum, struct __sk_buff *packet, __u32 offset, __u64 from, __u64 to, __u64 size);
HELPER(11, long, replace_l4_checksum, struct __sk_buff *packet, __u32 offset, __u64 from, __u64 to, __u64 flags);
HELPER(26, long, load_bytes, const void *packet, __u32 offset, void *to, __u32 length);
HELPER(28, long, checksum_difference, void *from, __u32 from_size, void *to, __u32 to_size, __u32 seed);
HELPER(46, __u64, socket_cookie, void *context);
HELPER(50, long, adjust_room, struct __sk_buff *packet, __s32 difference, __u32 mode, __u64 flags);
HELPER(59, long, set_callbacks, struct bpf_sock_ops *socket, int flags);
HELPER(107, void *, socket_storage, void *map, void *socket, void *initial, __u64 flags);
HELPER(122, __u64, namespace_cookie, void *context);
HELPER(130, long, ring_output, void *ring, void *data, __u64 size, __u64 flags);
HELPER(152, long, redirect_neighbour, __u32 device, void *next_hop, int size, __u64 flags);
HELPER(187, int, set_result, int value);
