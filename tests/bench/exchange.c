/* The exchange of a check in C, for comparison: reads HAProxy's line from fd 0, asks Patroni on 127.0.0.1:PORT
 * for /primary, looks for three strings in the answer, replies and closes the connection as a check does.
 * It has no options, no parser for JSON or HTTP, no sandbox and no error handling. */
#include <arpa/inet.h>
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static int wait_for(int fd, short events) {
    struct pollfd poll_fd = {.fd = fd, .events = events};
    return poll(&poll_fd, 1, 1500) == 1;
}

int main(int argc, char **argv) {
    char line[257], answer[16384], rest[1024];
    size_t length = 0;
    ssize_t count;
    if (argc != 2 || !wait_for(0, POLLIN) || (count = read(0, line, sizeof line)) <= 0 || !memchr(line, '\n', count)) return 1;
    struct sockaddr_in address = {
        .sin_family = AF_INET, .sin_port = htons(atoi(argv[1])), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    int patroni = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (connect(patroni, (void *)&address, sizeof address)) return 1;
    const char request[] = "GET /primary HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n";
    if (write(patroni, request, sizeof request - 1) != sizeof request - 1) return 1;
    while (wait_for(patroni, POLLIN) && (count = read(patroni, answer + length, sizeof answer - 1 - length)) > 0) length += count;
    answer[length] = 0;
    close(patroni);
    int ready = length > 12 && !memcmp(answer + 8, " 200", 4) && strstr(answer, "\"state\": \"running\"") && strstr(answer, "\"role\": \"primary\"");
    const char *reply = ready ? "up ready # primary, running, timeline 5\n" : "up maint # not the primary\n";
    fcntl(0, F_SETFL, O_NONBLOCK);
    write(0, reply, strlen(reply));
    shutdown(0, SHUT_WR);
    read(0, rest, sizeof rest);
    return 0;
}
