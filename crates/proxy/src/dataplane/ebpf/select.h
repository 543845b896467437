// The ways to choose among a list's endpoints: at random, by a table that is the same on every node (Maglev), or the less
// loaded of two. Which one is a flag of the frontend.
#pragma once

#include "layout.h"

// A list of at least one endpoint, and who asks.
struct choice {
	__u32 list;
	__u32 count;
	__u32 affinity_seconds;
	// Of the frontend.
	__u32 flags;
	// What names the connection on every node alike, or a random number where nothing does.
	__u64 hash;
	// Has not answered: somebody else, if there is anybody. Port 0: nobody was tried.
	struct endpoint tried;
};

// Murmur3's last step: every bit of the result depends on every bit of the number. `maglev.rs` has the same.
inlined __u64 mix(__u64 number)
{
	number ^= number >> 33;
	number *= 0xff51afd7ed558ccdULL;
	number ^= number >> 33;
	number *= 0xc4ceb9fe1a85ec53ULL;
	return number ^ number >> 33;
}

// The client and its port, but not what it asked for: that may be an address of this node alone.
inlined __u64 hash_client(const union address *client, __be16 port, __u8 protocol)
{
	return mix(mix(mix(client->halves[0]) ^ client->halves[1]) ^ ((__u64)port << 8 | protocol));
}

inlined __u32 slot_by_table(const struct choice *choice)
{
	__u32 size = choice->count <= 100 ? 1021 : choice->count <= 1600 ? 16381 : 65521;
	__u32 place = choice->hash % size;
	struct slot_key key = {.list = choice->list, .slot = place / PLACES};
	struct places *places = map_lookup(&maglev, &key);

	return places ? places->slots[place % PLACES] : 0;
}

inlined __s64 load_of(const struct endpoint *endpoint, __u8 protocol)
{
	struct load_key key = {.address = endpoint->address, .port = endpoint->port, .protocol = protocol};
	__s64 *sockets, *flows;

	key.kind = LOAD_OF_SOCKETS;
	sockets = map_lookup(&loads, &key);
	key.kind = LOAD_OF_FLOWS;
	flows = map_lookup(&loads, &key);
	return (sockets ? *sockets : 0) + (flows ? *flows : 0);
}

inlined int is_busier(const struct endpoint *one, const struct endpoint *other, __u8 protocol)
{
	return load_of(one, protocol) > load_of(other, protocol);
}

// Adds to what an endpoint is known to be busy with.
inlined void add_load(const struct endpoint *endpoint, __u8 protocol, __u8 kind, __s64 more)
{
	struct load_key key = {.address = endpoint->address, .port = endpoint->port, .protocol = protocol, .kind = kind};
	__s64 *load = map_lookup(&loads, &key);
	__s64 first = 0;

	if (!load && more > 0) {
		// Another processor may have been faster.
		map_update(&loads, &key, &first, BPF_NOEXIST);
		load = map_lookup(&loads, &key);
	}
	// Never below none, whatever ends that was not counted: what is wrong is right again when those that live have ended.
	if (load && (more > 0 || *load > 0))
		__sync_fetch_and_add(load, more);
}

// Only sockets that connect have an end that the kernel tells of.
inlined void count_socket(struct bpf_sock *socket, __u8 protocol, const struct endpoint *given)
{
	struct endpoint *held = socket_storage(&counted, socket, NULL, BPF_SK_STORAGE_GET_F_CREATE);

	if (!held)
		return;
	// It connects anew, or was given another endpoint.
	if (held->port)
		add_load(held, protocol, LOAD_OF_SOCKETS, -1);
	*held = *given;
	add_load(given, protocol, LOAD_OF_SOCKETS, 1);
}
