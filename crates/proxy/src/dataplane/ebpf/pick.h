// What both kinds of programs decide alike: which frontend, which endpoint.
#pragma once

#include "select.h"

#define SECOND 1000000000ULL

// Without a cookie this mode does not serve: what is new belongs to whoever does.
inlined struct node *this_node(void)
{
	__u32 zero = 0;
	struct node *node = map_lookup(&nodes, &zero);

	return node && node->cookie ? node : NULL;
}

inlined void set_address(__be32 to[4], const union address *from)
{
	to[0] = from->words[0];
	to[1] = from->words[1];
	to[2] = from->words[2];
	to[3] = from->words[3];
}

inlined void set_ipv4(union address *to, __be32 from)
{
	to->words[0] = 0;
	to->words[1] = 0;
	to->words[2] = __builtin_bswap32(0xffff);
	to->words[3] = from;
}

inlined int same_address(const union address *one, const union address *other)
{
	return one->halves[0] == other->halves[0] && one->halves[1] == other->halves[1];
}

inlined int is_same(const struct endpoint *one, const struct endpoint *other)
{
	return one->port == other->port && same_address(&one->address, &other->address);
}

inlined int in_networks(const union address *address, const struct network *networks, __u32 count)
{
	for (int at = 0; at < NETWORKS; at++) {
		if (at >= count)
			return 0;
		if ((address->halves[0] & networks[at].mask.halves[0]) == networks[at].address.halves[0] &&
		    (address->halves[1] & networks[at].mask.halves[1]) == networks[at].address.halves[1])
			return 1;
	}
	return 0;
}

inlined struct frontend *find_frontend(const union address *address, __be16 port, __u8 protocol)
{
	struct frontend_key key = {.port = port, .protocol = protocol};
	struct frontend *found;

	set_address(key.address, address);
	found = map_lookup(&frontends, &key);
	if (found)
		return found;
	key.port = 0;
	key.protocol = 0;
	return map_lookup(&frontends, &key);
}

inlined int is_member(__u32 list, __u16 kind, const struct endpoint *endpoint)
{
	struct member_key key = {.list = list, .kind = kind, .port = endpoint->port};

	set_address(key.address, &endpoint->address);
	return map_lookup(&members, &key) != NULL;
}

inlined struct endpoint *endpoint_at(__u32 list, __u32 slot)
{
	struct slot_key key = {.list = list, .slot = slot};

	return map_lookup(&endpoints, &key);
}

// Chooses an endpoint of a list of at least one; whether there was one.
separate int pick(const struct choice *choice, const union address *client, __u8 protocol, struct endpoint *picked)
{
	struct affinity_key client_key = {};
	struct endpoint *endpoint;
	__u32 list, count, affinity_seconds, slot;

	if (!choice || !client || !picked || !choice->count)
		return 0;
	list = choice->list;
	count = choice->count;
	affinity_seconds = choice->affinity_seconds;
	client_key.list = list;
	set_address(client_key.client, client);
	if (affinity_seconds) {
		struct affinity *held = map_lookup(&affinities, &client_key);
		__u64 now = now_ns();

		if (held && held->until > now && is_member(list, IN_LIST, &held->endpoint)) {
			held->until = now + affinity_seconds * SECOND;
			*picked = held->endpoint;
			return 1;
		}
	}
	slot = choice->flags & MAGLEV ? slot_by_table(choice) : random32() % count;
	endpoint = endpoint_at(list, slot);
	if (choice->flags & LEAST_LOAD && count > 1) {
		__u32 other_slot = (slot + 1 + random32() % (count - 1)) % count;
		struct endpoint *other = endpoint_at(list, other_slot);

		if (endpoint && other && is_busier(endpoint, other, protocol)) {
			endpoint = other;
			slot = other_slot;
		}
	}
	if (endpoint && is_same(endpoint, &choice->tried))
		endpoint = endpoint_at(list, (slot + 1) % count);
	// The count may be that of a moment ago: the first slot is never empty.
	if (!endpoint)
		endpoint = endpoint_at(list, 0);
	if (!endpoint)
		return 0;
	*picked = *endpoint;
	if (affinity_seconds) {
		struct affinity next = {.endpoint = *endpoint, .until = now_ns() + affinity_seconds * SECOND};

		map_update(&affinities, &client_key, &next, BPF_ANY);
	}
	return 1;
}
