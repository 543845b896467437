// The maps. `layout.rs` writes the same bytes: change both, and LAYOUT there.
//
// An IPv4 address is held as ::ffff:a.b.c.d, so that each map serves both families. Addresses and ports are in network
// order, numbers in the machine's.
#pragma once

#include "kernel.h"

union address {
	__u8 bytes[16];
	__be32 words[4];
	__u64 halves[2];
};

// A place to send to.
struct endpoint {
	union address address;
	__be16 port;
	__u16 unused;
	// Of a flow whose endpoint answers past this node: the device through which its packets leave, once one has.
	__u32 device;
};

// An address that clients use; port and protocol 0 stand for what the others leave of a cluster IP.
struct frontend_key {
	__be32 address[4];
	__be16 port;
	__u8 protocol;
	__u8 unused;
};

enum frontend_flags {
	// Nobody anywhere answers: refuse. Without this flag an empty list drops.
	REFUSED = 1,
	MASQUERADE = 2,
	MASQUERADE_OUTSIDE = 4,
	// Only `sources` may use it.
	FIREWALL = 8,
	// The firewall lets the node itself pass.
	NODE_ALLOWED = 16,
	// How endpoints are chosen, if not at random.
	MAGLEV = 32,
	LEAST_LOAD = 64,
	// Endpoints on other nodes answer their clients past this node (DSR).
	DIRECT = 128,
};

struct frontend {
	__u32 id;
	// Endpoints for pods and for the node itself.
	__u32 list;
	__u32 count;
	// Endpoints for everybody else.
	__u32 outside_list;
	__u32 outside_count;
	__u32 affinity_seconds;
	__u32 flags;
};

struct slot_key {
	__u32 list;
	__u32 slot;
};

// A part of a list's Maglev table: slots of endpoints. `slot_key.slot` counts the parts.
#define PLACES 16

struct places {
	__u16 slots[PLACES];
};

enum load_kind { LOAD_OF_SOCKETS, LOAD_OF_FLOWS };

// Live connections to an endpoint, whatever Service they came by.
struct load_key {
	union address address;
	__be16 port;
	__u8 protocol;
	__u8 kind;
	__u32 unused;
};

enum member_kind {
	IN_LIST = 0,
	// May go on answering a UDP flow; `list` is the frontend's id, as below.
	SERVING = 1,
	// On another node, which takes packets of clients for it and answers them itself.
	TAKEN_THERE = 2,
	// On this node, for a frontend's own address.
	TAKEN_HERE = 3,
	// On this node, for a node port of any node; `list` is the port, as a number, and the protocol.
	TAKEN_BY_PORT = 4,
};

struct member_key {
	__u32 list;
	__u16 kind;
	__be16 port;
	__be32 address[4];
};

struct source_key {
	__u32 prefix_length;
	__u32 id;
	__be32 address[4];
};

struct affinity_key {
	__u32 list;
	__be32 client[4];
};

struct affinity {
	struct endpoint endpoint;
	__u64 until;
};

// A packet as a hook sees it.
struct flow_key {
	union address source;
	union address destination;
	__be16 source_port;
	__be16 destination_port;
	__u8 protocol;
	// Seen while it leaves: the source is rewritten. Otherwise the destination.
	__u8 leaving;
	__u16 unused;
};

enum flow_flags {
	// From a client to an endpoint: may be picked anew.
	PICKED = 1,
	// An endpoint's answer.
	ANSWER = 2,
	ANSWERED = 4,
	// Another endpoint is left that has not been tried: a refusal is held back, and the repeated SYN goes there.
	OTHERS_LEFT = 8,
	// Of a socket of this node that was given an endpoint when it connected, and another when it repeated its SYN.
	MOVED = 16,
	// A FIN or a RST has gone this way.
	CLOSED = 32,
	// Is part of its endpoint's load.
	COUNTED = 64,
	// Its endpoint answers past this node.
	PAST = 128,
	// The same, as it leaves to the endpoint's node: what opens it carries along whom the client asked for.
	OPENS = 256,
	// Its SYN came a second time, and went to the same endpoint.
	REPEATED = 512,
	// The client has sent more than first packets: the next of these begins another connection.
	TALKED = 1024,
};

struct flow {
	struct endpoint to;
	__u32 id;
	__u32 flags;
	// With IP headers.
	__u64 bytes;
	__u64 seen;
};

// What a socket was given in place of what it asked for, and the other way round.
struct socket_key {
	__u64 cookie;
	struct endpoint at;
	__u64 asked;
};

// The same for a TCP socket, which has one peer in its life.
struct peer {
	struct endpoint asked;
	struct endpoint given;
	// Who answers: not the one that was given, if that did not and the SYN was repeated.
	struct endpoint actual;
	// When its SYN was sent.
	__u64 begun;
	__u32 phase;
	// Other endpoints could have been given.
	__u32 others;
};

enum peer_phase {
	CHOSEN = 1,
	SENT = 2,
	ENDED = 3,
};

struct network {
	union address address;
	union address mask;
};

#define NETWORKS 8

struct node {
	// Of the node's network namespace. 0: this mode does not serve, not yet or no longer.
	__u64 cookie;
	// What masqueraded packets come from: IPv4, IPv6.
	union address addresses[2];
	__u32 pod_networks;
	__u32 service_networks;
	struct network pods[NETWORKS];
	struct network services[NETWORKS];
	// Whether there are pod networks of the family: without one nobody is outside.
	__u32 has_pods[2];
	// What every device takes, with IP headers.
	__u32 mtu;
	__u32 unused;
};

struct {
	INTEGER(type, BPF_MAP_TYPE_HASH);
	INTEGER(max_entries, 1 << 18);
	INTEGER(map_flags, BPF_F_NO_PREALLOC);
	INTEGER(pinning, PIN_BY_NAME);
	TYPE(key, struct frontend_key);
	TYPE(value, struct frontend);
} frontends SEC(".maps");

struct {
	INTEGER(type, BPF_MAP_TYPE_HASH);
	INTEGER(max_entries, 1 << 20);
	INTEGER(map_flags, BPF_F_NO_PREALLOC);
	INTEGER(pinning, PIN_BY_NAME);
	TYPE(key, struct slot_key);
	TYPE(value, struct endpoint);
} endpoints SEC(".maps");

struct {
	INTEGER(type, BPF_MAP_TYPE_HASH);
	INTEGER(max_entries, 1 << 18);
	INTEGER(map_flags, BPF_F_NO_PREALLOC);
	INTEGER(pinning, PIN_BY_NAME);
	TYPE(key, struct member_key);
	TYPE(value, __u32);
} members SEC(".maps");

struct {
	INTEGER(type, BPF_MAP_TYPE_LPM_TRIE);
	INTEGER(max_entries, 1 << 16);
	INTEGER(map_flags, BPF_F_NO_PREALLOC);
	INTEGER(pinning, PIN_BY_NAME);
	TYPE(key, struct source_key);
	TYPE(value, __u32);
} sources SEC(".maps");

struct {
	INTEGER(type, BPF_MAP_TYPE_ARRAY);
	INTEGER(max_entries, 1);
	INTEGER(pinning, PIN_BY_NAME);
	TYPE(key, __u32);
	TYPE(value, struct node);
} nodes SEC(".maps");

struct {
	INTEGER(type, BPF_MAP_TYPE_HASH);
	INTEGER(max_entries, 1 << 18);
	INTEGER(map_flags, BPF_F_NO_PREALLOC);
	INTEGER(pinning, PIN_BY_NAME);
	TYPE(key, struct slot_key);
	TYPE(value, struct places);
} maglev SEC(".maps");

// Other nodes whose proxies take packets for endpoints of theirs and answer the clients themselves.
struct {
	INTEGER(type, BPF_MAP_TYPE_HASH);
	INTEGER(max_entries, 1 << 14);
	INTEGER(map_flags, BPF_F_NO_PREALLOC);
	INTEGER(pinning, PIN_BY_NAME);
	TYPE(key, union address);
	TYPE(value, __u32);
} takers SEC(".maps");

// Filled by packets; the least recently used make room.

struct {
	INTEGER(type, BPF_MAP_TYPE_LRU_HASH);
	INTEGER(max_entries, 1 << 14);
	INTEGER(pinning, PIN_BY_NAME);
	TYPE(key, struct load_key);
	TYPE(value, __s64);
} loads SEC(".maps");

struct {
	INTEGER(type, BPF_MAP_TYPE_LRU_HASH);
	INTEGER(max_entries, 1 << 16);
	INTEGER(pinning, PIN_BY_NAME);
	TYPE(key, struct affinity_key);
	TYPE(value, struct affinity);
} affinities SEC(".maps");

struct {
	INTEGER(type, BPF_MAP_TYPE_LRU_HASH);
	INTEGER(max_entries, 1 << 17);
	INTEGER(pinning, PIN_BY_NAME);
	TYPE(key, struct flow_key);
	TYPE(value, struct flow);
} flows SEC(".maps");

struct {
	INTEGER(type, BPF_MAP_TYPE_LRU_HASH);
	INTEGER(max_entries, 1 << 16);
	INTEGER(pinning, PIN_BY_NAME);
	TYPE(key, struct socket_key);
	TYPE(value, struct endpoint);
} sockets SEC(".maps");

// Connections and first packets that found no endpoint, by what they asked for.
struct {
	INTEGER(type, BPF_MAP_TYPE_LRU_HASH);
	INTEGER(max_entries, 1 << 14);
	INTEGER(pinning, PIN_BY_NAME);
	TYPE(key, struct frontend_key);
	TYPE(value, __u64);
} rejected SEC(".maps");

// Lives and dies with the socket.
struct {
	INTEGER(type, BPF_MAP_TYPE_SK_STORAGE);
	INTEGER(map_flags, BPF_F_NO_PREALLOC);
	INTEGER(pinning, PIN_BY_NAME);
	TYPE(key, int);
	TYPE(value, struct peer);
} peers SEC(".maps");

// The endpoint whose load a socket is part of.
struct {
	INTEGER(type, BPF_MAP_TYPE_SK_STORAGE);
	INTEGER(map_flags, BPF_F_NO_PREALLOC);
	INTEGER(pinning, PIN_BY_NAME);
	TYPE(key, int);
	TYPE(value, struct endpoint);
} counted SEC(".maps");
