// A packet's addresses and ports: how they are read, and how others are written in their place. The same for the packet that
// an ICMP error is about.
#pragma once

#include "watch.h"

#define TCP_SEQUENCE 4
#define TCP_FLAGS 13
#define TCP_FIN 1
#define TCP_SYN 2
#define TCP_RST 4
#define TCP_ACK 16
// Known to kernels since 6.16; older ones refuse it.
#define CHECKSUM_OF_IPV6 (1ULL << 7)
#define INVALID 22

struct packet {
	struct flow_key key;
	__u32 transport;
	__u32 length;
	__u8 is_ipv6;
	__u8 tcp_flags;
};

// Whether the packet at this offset is one that Services are about.
inlined int parse_at(struct __sk_buff *skb, struct packet *packet, __u8 leaving, __u32 at)
{
	__be16 ports[2];

	__builtin_memset(packet, 0, sizeof(*packet));
	packet->key.leaving = leaving;
	packet->length = skb->len - at;
	if (skb->protocol == big16(ETH_P_IP)) {
		struct iphdr header;

		if (load_bytes(skb, at, &header, sizeof(header)))
			return 0;
		// Ports are in the first fragment only: fragments are not translated at all.
		if (header.ihl < 5 || header.frag_off & big16(0x3fff))
			return 0;
		set_ipv4(&packet->key.source, header.saddr);
		set_ipv4(&packet->key.destination, header.daddr);
		packet->key.protocol = header.protocol;
		packet->transport = at + header.ihl * 4;
	} else if (skb->protocol == big16(ETH_P_IPV6)) {
		struct ipv6hdr header;

		if (load_bytes(skb, at, &header, sizeof(header)))
			return 0;
		__builtin_memcpy(&packet->key.source, &header.saddr, 16);
		__builtin_memcpy(&packet->key.destination, &header.daddr, 16);
		packet->key.protocol = header.nexthdr;
		packet->transport = at + sizeof(header);
		packet->is_ipv6 = 1;
	} else {
		return 0;
	}
	if (packet->key.protocol != IPPROTO_TCP && packet->key.protocol != IPPROTO_UDP)
		return 0;
	if (load_bytes(skb, packet->transport, ports, sizeof(ports)))
		return 0;
	packet->key.source_port = ports[0];
	packet->key.destination_port = ports[1];
	if (packet->key.protocol == IPPROTO_TCP)
		load_bytes(skb, packet->transport + TCP_FLAGS, &packet->tcp_flags, 1);
	return 1;
}

inlined int parse(struct __sk_buff *skb, struct packet *packet, __u8 leaving)
{
	return parse_at(skb, packet, leaving, ETH_HLEN);
}

inlined int is_first_syn(const struct packet *packet)
{
	return (packet->tcp_flags & (TCP_SYN | TCP_ACK)) == TCP_SYN;
}

// Writes a new destination or source, address and port.
separate int rewrite(struct __sk_buff *skb, const struct packet *packet, const struct endpoint *to, int source)
{
	union address from, address;
	__u32 transport, checksum;
	__be16 from_port, port;
	__u64 flags = 0;

	if (!packet || !to)
		return TC_ACT_SHOT;
	from = source ? packet->key.source : packet->key.destination;
	from_port = source ? packet->key.source_port : packet->key.destination_port;
	address = to->address;
	port = to->port;
	transport = packet->transport;
	checksum = transport + 16;
	if (packet->key.protocol == IPPROTO_UDP) {
		checksum = transport + 6;
		// A UDP packet without a checksum stays without.
		flags = BPF_F_MARK_MANGLED_0;
	}
	if (packet->is_ipv6) {
		long difference = checksum_difference(&from, 16, &address, 16, 0);

		if (replace_l4_checksum(skb, checksum, 0, difference, BPF_F_PSEUDO_HDR | CHECKSUM_OF_IPV6 | flags) == -INVALID)
			replace_l4_checksum(skb, checksum, 0, difference, BPF_F_PSEUDO_HDR | flags);
		store_bytes(skb, ETH_HLEN + (source ? 8 : 24), &address, 16, 0);
	} else {
		replace_l4_checksum(skb, checksum, from.words[3], address.words[3], BPF_F_PSEUDO_HDR | flags | 4);
		replace_l3_checksum(skb, ETH_HLEN + 10, from.words[3], address.words[3], 4);
		store_bytes(skb, ETH_HLEN + (source ? 12 : 16), &address.words[3], 4, 0);
	}
	replace_l4_checksum(skb, checksum, from_port, port, flags | 2);
	if (store_bytes(skb, transport + (source ? 0 : 2), &port, 2, 0))
		return TC_ACT_SHOT;
	return TC_ACT_OK;
}

#define ICMP_CHECKSUM 2
#define ICMP_HEADER 8

// An ICMP error and the packet it is about. `key` is that packet's answer, which has the same flow.
struct error {
	struct flow_key key;
	union address source;
	union address destination;
	__u32 icmp;
	__u32 inner;
	__u32 inner_transport;
	__u8 is_ipv6;
	// Not just too large for a link, nor underway for too long.
	__u8 is_unreachable;
};

// Whether this is an error about a packet that Services may be about.
inlined int parse_error(struct __sk_buff *skb, struct error *error, __u8 leaving)
{
	__be16 ports[2];
	// And code.
	__u8 type[2];

	__builtin_memset(error, 0, sizeof(*error));
	error->key.leaving = leaving;
	if (skb->protocol == big16(ETH_P_IP)) {
		struct iphdr header;

		if (load_bytes(skb, ETH_HLEN, &header, sizeof(header)) || header.protocol != IPPROTO_ICMP)
			return 0;
		if (header.ihl < 5 || header.frag_off & big16(0x3fff))
			return 0;
		set_ipv4(&error->source, header.saddr);
		set_ipv4(&error->destination, header.daddr);
		error->icmp = ETH_HLEN + header.ihl * 4;
		error->inner = error->icmp + ICMP_HEADER;
		// Unreachable, time exceeded, bad parameter.
		if (load_bytes(skb, error->icmp, type, sizeof(type)) || (type[0] != 3 && type[0] != 11 && type[0] != 12))
			return 0;
		error->is_unreachable = type[0] == 3 && type[1] != 4;
		if (load_bytes(skb, error->inner, &header, sizeof(header)) || header.ihl < 5)
			return 0;
		set_ipv4(&error->key.destination, header.saddr);
		set_ipv4(&error->key.source, header.daddr);
		error->key.protocol = header.protocol;
		error->inner_transport = error->inner + header.ihl * 4;
	} else if (skb->protocol == big16(ETH_P_IPV6)) {
		struct ipv6hdr header;

		if (load_bytes(skb, ETH_HLEN, &header, sizeof(header)) || header.nexthdr != IPPROTO_ICMPV6)
			return 0;
		__builtin_memcpy(&error->source, &header.saddr, 16);
		__builtin_memcpy(&error->destination, &header.daddr, 16);
		error->icmp = ETH_HLEN + sizeof(header);
		error->inner = error->icmp + ICMP_HEADER;
		// Unreachable, too big, time exceeded, bad parameter.
		if (load_bytes(skb, error->icmp, type, sizeof(type)) || type[0] < 1 || type[0] > 4)
			return 0;
		error->is_unreachable = type[0] == 1;
		if (load_bytes(skb, error->inner, &header, sizeof(header)))
			return 0;
		__builtin_memcpy(&error->key.destination, &header.saddr, 16);
		__builtin_memcpy(&error->key.source, &header.daddr, 16);
		error->key.protocol = header.nexthdr;
		error->inner_transport = error->inner + sizeof(header);
		error->is_ipv6 = 1;
	} else {
		return 0;
	}
	if (error->key.protocol != IPPROTO_TCP && error->key.protocol != IPPROTO_UDP)
		return 0;
	if (load_bytes(skb, error->inner_transport, ports, sizeof(ports)))
		return 0;
	error->key.destination_port = ports[0];
	error->key.source_port = ports[1];
	return 1;
}

// Writes an address of the error itself. Its checksum covers addresses in IPv6 only.
separate int rewrite_outer(struct __sk_buff *skb, const struct error *error, const union address *to, int source)
{
	union address from, address;

	if (!error || !to)
		return 0;
	from = source ? error->source : error->destination;
	address = *to;
	if (error->is_ipv6) {
		__u32 checksum = error->icmp + ICMP_CHECKSUM;
		long difference = checksum_difference(&from, 16, &address, 16, 0);

		if (replace_l4_checksum(skb, checksum, 0, difference, BPF_F_PSEUDO_HDR | CHECKSUM_OF_IPV6) == -INVALID)
			replace_l4_checksum(skb, checksum, 0, difference, BPF_F_PSEUDO_HDR);
		store_bytes(skb, ETH_HLEN + (source ? 8 : 24), &address, 16, 0);
	} else {
		replace_l3_checksum(skb, ETH_HLEN + 10, from.words[3], address.words[3], 4);
		store_bytes(skb, ETH_HLEN + (source ? 12 : 16), &address.words[3], 4, 0);
	}
	return 0;
}

// Writes an end of the packet that the error is about. Its own transport checksum may be cut off, and nobody looks at it.
separate int rewrite_inner(struct __sk_buff *skb, const struct error *error, const struct endpoint *to, int source)
{
	union address from, address;
	__be16 from_port, port;
	__u32 checksum;

	if (!error || !to)
		return 0;
	// The key is the answer's: the other way round.
	from = source ? error->key.destination : error->key.source;
	from_port = source ? error->key.destination_port : error->key.source_port;
	address = to->address;
	port = to->port;
	checksum = error->icmp + ICMP_CHECKSUM;
	if (error->is_ipv6) {
		long difference = checksum_difference(&from, 16, &address, 16, 0);

		replace_l4_checksum(skb, checksum, 0, difference, 0);
		store_bytes(skb, error->inner + (source ? 8 : 24), &address, 16, 0);
	} else {
		// The inner header's checksum makes up for its address: the outer one does not change.
		replace_l3_checksum(skb, error->inner + 10, from.words[3], address.words[3], 4);
		store_bytes(skb, error->inner + (source ? 12 : 16), &address.words[3], 4, 0);
	}
	replace_l4_checksum(skb, checksum, from_port, port, 2);
	store_bytes(skb, error->inner_transport + (source ? 0 : 2), &port, 2, 0);
	return 0;
}
