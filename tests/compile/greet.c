/* SPDX-License-Identifier: MIT */
/*
 * Usage: greet SOCKET
 * Says hello to a vfio-user device: VERSION, then DEVICE_GET_INFO, written out by hand from the specification so that it shares
 * no mistake with the headers. Waits ten seconds for the socket and for each reply. Status 0 if both were answered well.
 */
#define _DEFAULT_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

struct header {
    uint16_t id, command;
    uint32_t size, flags, error;
};

/* Sends one command and receives its reply, of which at least `least` bytes follow the header. */
static int ask(int fd, uint16_t command, const void *body, size_t len, void *reply, size_t least, size_t most)
{
    struct header header = {command, command, (uint32_t)(sizeof(header) + len), 0, 0};
    char message[256];

    memcpy(message, &header, sizeof(header));
    memcpy(message + sizeof(header), body, len);
    if (send(fd, message, header.size, MSG_NOSIGNAL) != (ssize_t)header.size) {
        return -1;
    }
    if (recv(fd, &header, sizeof(header), MSG_WAITALL) != (ssize_t)sizeof(header)) {
        return -1;
    }
    size_t got = header.size - sizeof(header);
    if (header.id != command || header.command != command || header.flags != 1 || got < least || got > most) {
        return -1;
    }
    return recv(fd, reply, got, MSG_WAITALL) == (ssize_t)got ? 0 : -1;
}

int main(int argc, char **argv)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    const struct timeval limit = {.tv_sec = 10};
    const uint8_t version[] = "\0\0\0\0{\"capabilities\":{}}";
    const uint32_t question[4] = {16, 0, 0, 0}; /* argsz, flags, regions, interrupt indexes */
    uint32_t info[4];
    uint16_t reply[128];
    int tries = 0;

    if (argc != 2 || strlen(argv[1]) >= sizeof(address.sun_path)) {
        return 2;
    }
    memcpy(address.sun_path, argv[1], strlen(argv[1]) + 1);
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);
    while (connect(fd, (struct sockaddr *)&address, sizeof(address)) != 0) {
        if (++tries == 100) {
            perror(argv[1]);
            return 1;
        }
        usleep(100000);
    }
    (void)setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof(limit));

    if (ask(fd, 1, version, sizeof(version), reply, 4, sizeof(reply)) != 0 || reply[0] != 0 || reply[1] != 0) {
        fputs("VERSION was not answered well\n", stderr);
        return 1;
    }
    if (ask(fd, 4, question, sizeof(question), info, sizeof(info), sizeof(info)) != 0 || info[2] < 9) {
        fputs("DEVICE_GET_INFO was not answered well\n", stderr);
        return 1;
    }
    printf("flags 0x%x, %u regions, %u interrupt indexes\n", info[1], info[2], info[3]);
    close(fd);
    return 0;
}
